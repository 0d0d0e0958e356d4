// SPDX-License-Identifier: Apache-2.0

// Package lb is a load balancer in the kernel's socket hooks: a connect(2) to a Service address becomes a connect(2) to
// one of its backends, and a sendto(2) likewise. It knows addresses, not Kubernetes.
//
// It carries TCP and UDP over IPv4 and IPv6: for the processes of a cgroup at their sockets, and for whoever sends packets to a device
// of the node by conntrack's NAT; those over SCTP, too.
package lb

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

var (
	// ErrNotSupported is wrapped by errors that say what this kernel cannot do.
	ErrNotSupported = errors.New("not supported by this kernel")
	// ErrFull is wrapped by errors of frontends that a map has no room for.
	ErrFull = errors.New("map is full")
	// ErrRootCgroup is wrapped by Attach's error for the root of the cgroup hierarchy, which holds the whole host.
	ErrRootCgroup = errors.New("the root cgroup holds the whole host, name a folder below it")
)

// Defaults of Options.
const (
	DefaultServices   = 1 << 16
	DefaultBackends   = 1 << 18
	DefaultAffinities = 1 << 16
	DefaultGrace      = time.Second
)

// Options are fixed when a Balancer is loaded. The zero value means the defaults.
type Options struct {
	// Services is how many frontends of each IP version there may be, for clients inside and outside, at 128 bytes each,
	// rounded up to a power of two and at least 4 KiB. 0 means DefaultServices.
	Services int
	// Backends is how many backends of each IP version the backends maps hold: for IPv4 of all frontends that have more
	// than three, at 8 bytes each; for IPv6 of all, at 32. It is rounded up to a power of two, and eight are not used. A
	// frontend with n backends takes n of them rounded up to a power of two, and twice as many while it changes. 0 means
	// DefaultBackends.
	Backends int
	// Affinities is how many pairs of a client and an affinity are remembered, at some 150 bytes each; after that the one that
	// was not used for longest is forgotten. 0 means DefaultAffinities.
	Affinities int
	// Grace is how long the backends that a frontend had before a change stay untouched for connects that are under
	// way. 0 means DefaultGrace.
	Grace time.Duration
	// PeerNames has getpeername(2) name the frontend on TCP sockets too; else it names the backend. Each connect then
	// allocates state for its socket, which costs more than the rest. UDP sockets have it in any case: resolvers drop
	// answers from any address but the one they asked.
	PeerNames bool
	// Packets loads the programs for devices, too. Nil means that only sockets are looked at.
	Packets *PacketOptions
	// PinDir is a folder on a bpffs under which maps and links are pinned, in a folder named for their layout, so that
	// connects go on being translated while no process holds them. Load takes over what it finds there. Deleting the
	// folder removes all that outlives the process. Empty means that nothing does.
	PinDir string
}

func (o Options) withDefaults() Options {
	if o.Services == 0 {
		o.Services = DefaultServices
	}
	if o.Backends == 0 {
		o.Backends = DefaultBackends
	}
	if o.Affinities == 0 {
		o.Affinities = DefaultAffinities
	}
	if o.Grace == 0 {
		o.Grace = DefaultGrace
	}
	o.Backends = roundUpPowerOfTwo(max(o.Backends, 2*entryWords))
	return o
}

func (o Options) validate() error {
	if o.Services < 0 || o.Services > 1<<22 {
		return fmt.Errorf("services capacity %d: want 1 to %d", o.Services, 1<<22)
	}
	if o.Backends < 0 || o.Backends > 1<<26 {
		return fmt.Errorf("backends capacity %d: want 1 to %d", o.Backends, 1<<26)
	}
	if o.Affinities < 0 || o.Affinities > 1<<24 {
		return fmt.Errorf("affinities capacity %d: want 1 to %d", o.Affinities, 1<<24)
	}
	if o.Grace < 0 {
		return fmt.Errorf("grace period %v is negative", o.Grace)
	}
	return nil
}

// A Balancer is the programs with their maps. Its methods may be called from several goroutines.
type Balancer struct {
	// Set once by Load.
	options              Options
	objects              socketObjects
	packets              packetObjects // empty without PacketOptions
	forsake              forsakeObjects
	forsakeErr           error // why the kernel cannot carry it; nil if it can
	insiders, clusterIPs *ebpf.Map
	namespaces           *ebpf.Map

	// Guarded by mu.
	mu           sync.Mutex
	links        []link.Link       // one for each hook; nil until Attach
	devices      map[int]link.Link // by index
	loop         loop
	dropsInvalid bool
	ipv4, ipv6   *family
	addresses    *addresses
	ranges       *annex[netip.Prefix, rangeKey]
	lingering    *annex[netip.AddrPort, lingerKey]
}

// families lists those that are there: both, once Load has succeeded.
func (b *Balancer) families() []*family {
	return slices.DeleteFunc([]*family{b.ipv4, b.ipv6}, func(f *family) bool { return f == nil })
}

// A hook is a place in the kernel with the program for it.
type hook struct {
	name    string
	attach  ebpf.AttachType
	program *ebpf.Program
}

func (b *Balancer) hooks() []hook {
	var hooks []hook
	if b.options.PeerNames {
		hooks = append(hooks, b.releaseHook()) // before sockets have names that it takes away
	}
	return append(hooks, []hook{
		{socketProgConnect4, ebpf.AttachCGroupInet4Connect, b.objects.Connect4},
		{socketProgConnect6, ebpf.AttachCGroupInet6Connect, b.objects.Connect6},
		{socketProgSendmsg4, ebpf.AttachCGroupUDP4Sendmsg, b.objects.Sendmsg4},
		{socketProgSendmsg6, ebpf.AttachCGroupUDP6Sendmsg, b.objects.Sendmsg6},
		{socketProgRecvmsg4, ebpf.AttachCGroupUDP4Recvmsg, b.objects.Recvmsg4},
		{socketProgRecvmsg6, ebpf.AttachCGroupUDP6Recvmsg, b.objects.Recvmsg6},
		{socketProgGetpeername4, ebpf.AttachCgroupInet4GetPeername, b.objects.Getpeername4},
		{socketProgGetpeername6, ebpf.AttachCgroupInet6GetPeername, b.objects.Getpeername6},
	}...)
}

// releaseHook sees sockets being closed, whose peers have no names from then on.
func (b *Balancer) releaseHook() hook {
	return hook{socketProgRelease, ebpf.AttachCgroupInetSockRelease, b.objects.Release}
}

// Load creates the maps and loads the programs, attached to nothing yet. With a PinDir that a former Balancer of the same
// sizes left, it continues with that one's frontends. One of other sizes serves what it has until Supersede is called.
//
// It needs Linux 6.1 (bpf_set_retval in connect hooks) and CAP_BPF with CAP_NET_ADMIN, as root has.
func Load(options Options) (_ *Balancer, err error) {
	if err := options.validate(); err != nil {
		return nil, err
	}
	b := &Balancer{options: options.withDefaults(), devices: make(map[int]link.Link), addresses: newAddresses(), ranges: newAnnex(rangeKeyOf), lingering: newAnnex(lingerKeyOf)}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.Close())
		}
	}()

	sockets, err := loadSocket()
	if err != nil {
		return nil, fmt.Errorf("read the embedded object: %w", err)
	}
	packets, err := loadPacket()
	if err != nil {
		return nil, fmt.Errorf("read the embedded object: %w", err)
	}
	leaving, err := loadForsake()
	if err != nil {
		return nil, fmt.Errorf("read the embedded object: %w", err)
	}
	maps, err := b.openMaps(sockets, packets, leaving)
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		if err := b.setAside(); err != nil {
			return nil, err
		}
		maps, err = b.openMaps(sockets, packets, leaving)
	}
	if err != nil {
		return nil, b.explainLoad(err)
	}
	defer func() {
		for _, m := range maps {
			err = errors.Join(err, m.Close()) // objects has its own copies
		}
	}()
	const protection = unix.PROT_READ | unix.PROT_WRITE
	if b.ipv4, err = newFamily(b.options, keyWords4, slotWords4, maps[socketMapServices4], maps[socketMapBackends4], protection); err != nil {
		return nil, err
	}
	if b.ipv6, err = newFamily(b.options, keyWords6, slotWords6, maps[socketMapServices6], maps[socketMapBackends6], protection); err != nil {
		return nil, err
	}
	for _, f := range b.families() {
		f.place = func(base int, backends []netip.AddrPort) error { return b.placeSCTP(f, base, backends) }
	}
	if err := errors.Join(b.ipv4.table.seed(), b.ipv6.table.seed()); err != nil {
		return nil, err
	}
	if err := setConstants(sockets, b.tableConstants(), map[constant]uint64{peerNamesConstant: truth(b.options.PeerNames)}); err != nil {
		return nil, err
	}
	if err := sockets.LoadAndAssign(&b.objects, &ebpf.CollectionOptions{MapReplacements: replacements(sockets, maps)}); err != nil {
		return nil, b.explainLoad(err)
	}
	if err := b.loadLeaving(leaving, maps); err != nil {
		return nil, err
	}
	if b.options.Packets != nil {
		if err := b.loadPackets(packets, maps); err != nil {
			return nil, err
		}
	}
	for name, m := range map[string]**ebpf.Map{packetMapInsiders: &b.insiders, packetMapClusterIps: &b.clusterIPs, packetMapAddresses: &b.addresses.programs, socketMapRanges: &b.ranges.programs,
		socketMapLingering: &b.lingering.programs, socketMapNamespaces: &b.namespaces} {
		if *m, err = maps[name].Clone(); err != nil {
			return nil, err
		}
	}
	if b.options.PinDir == "" {
		return b, nil // the maps are new, and reading them would give each page its memory
	}
	for _, f := range b.families() {
		if err := f.takeOver(); err != nil {
			return nil, fmt.Errorf("maps in %s: %w (delete the folder)", b.pinDir(), err)
		}
	}
	return b, errors.Join(b.addresses.takeOver(), b.ranges.takeOver(), b.lingering.takeOver())
}

// replacements are those of maps that a spec has.
func replacements(spec *ebpf.CollectionSpec, maps map[string]*ebpf.Map) map[string]*ebpf.Map {
	theirs := make(map[string]*ebpf.Map)
	for name, m := range maps {
		if spec.Maps[name] != nil {
			theirs[name] = m
		}
	}
	return theirs
}

// openMaps makes the maps of the specs, or opens those that are pinned.
func (b *Balancer) openMaps(specs ...*ebpf.CollectionSpec) (_ map[string]*ebpf.Map, err error) {
	entries := map[string]int{
		socketMapServices4:  tableBuckets(b.options.Services) + 1,
		socketMapServices6:  tableBuckets(b.options.Services) + 1,
		socketMapBackends4:  b.options.Backends,
		socketMapBackends6:  b.options.Backends,
		socketMapAffinities: b.options.Affinities,
		// What sockets remember has no size of its own.
		socketMapDatagrams:      0,
		socketMapCrowdedStreams: 0,
		socketMapStreams:        1, // unused without PeerNames
		socketMapNamespaces:     maxNamespaces,
		socketMapStrangers:      strangersBytes,
		packetMapInsiders:       maxPrefixes,
		packetMapClusterIps:     maxPrefixes,
		socketMapRanges:         b.options.Services,
		packetMapAddresses:      2 * b.options.Services, // of both IP versions
		socketMapLingering:      b.options.Services,
	}
	pin := ebpf.MapOptions{}
	if b.options.PinDir != "" {
		if err := os.MkdirAll(b.pinDir(), 0o700); err != nil {
			return nil, fmt.Errorf("pin folder: %w", err)
		}
		pin.PinPath = b.pinDir()
		if !b.options.PeerNames {
			if err := removePin(filepath.Join(b.pinDir(), socketMapStreams)); err != nil {
				return nil, err
			}
		}
	}
	if b.options.PeerNames {
		entries[socketMapStreams] = maxStreams
	}
	maps := make(map[string]*ebpf.Map)
	for name, n := range entries {
		var spec *ebpf.MapSpec
		for _, s := range specs {
			if s.Maps[name] != nil {
				spec = s.Maps[name]
				spec.MaxEntries = uint32(n)
			}
		}
		if b.options.PinDir != "" && (b.options.PeerNames || name != socketMapStreams) {
			spec.Pinning = ebpf.PinByName
		}
		m, err := ebpf.NewMapWithOptions(spec, pin)
		if err != nil {
			for _, m := range maps {
				err = errors.Join(err, m.Close())
			}
			return nil, err
		}
		maps[name] = m
	}
	return maps, nil
}

// explainLoad says of an error of the kernel what the caller can do about it.
func (b *Balancer) explainLoad(err error) error {
	switch {
	case errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("load the socket hooks: %w: %w", ErrNotSupported, err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("load the socket hooks: BPF is not permitted here (want root, or CAP_BPF and CAP_NET_ADMIN): %w", err)
	case !refusesConnects() || isOlderThan(6, 1):
		return fmt.Errorf("load the socket hooks: bpf_set_retval (Linux 6.1): %w: %w", ErrNotSupported, err)
	}
	return fmt.Errorf("load the socket hooks: %w", err)
}

// isOlderThan tells whether this kernel is older than a version. It decides nothing but what a failure is called.
func isOlderThan(major, minor uint32) bool {
	version, err := features.LinuxVersionCode()
	return err == nil && version < major<<16|minor<<8
}

// refusesConnects tells whether a program at connect4 may choose the errno.
//
// Note: the probe of package features was the first plan. It loads a program that Linux 7.2 refuses for another reason
// (cilium/ebpf#2099).
func refusesConnects() bool {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R1, -int32(unix.ECONNREFUSED)), asm.FnSetRetval.Call(), asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return false
	}
	return program.Close() == nil
}

// Attach lets the programs see every connect(2) and sendto(2) of the processes in a cgroup2 folder and its sub-folders. With a PinDir it
// replaces the programs that a former Balancer attached there: no connect goes untranslated meanwhile. After an error some
// may be attached: Detach, or Close without a PinDir, ends that.
func (b *Balancer) Attach(cgroup string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.links != nil {
		return errors.New("the socket hooks are attached already")
	}
	if err := checkCgroup(cgroup); err != nil {
		return fmt.Errorf("attach the socket hooks to %s: %w", cgroup, err)
	}
	if b.options.PinDir != "" && !b.options.PeerNames {
		if err := removePin(b.linkPin(b.releaseHook())); err != nil {
			return err
		}
	}
	for _, h := range b.hooks() {
		if err := b.attach(h, cgroup); err != nil {
			if errors.Is(err, ebpf.ErrNotSupported) {
				err = fmt.Errorf("%w: %w", ErrNotSupported, err)
			}
			return fmt.Errorf("attach %s to %s: %w", h.name, cgroup, err)
		}
	}
	return nil
}

func (b *Balancer) attach(h hook, cgroup string) error {
	if b.options.PinDir != "" {
		l, err := b.replacePinned(h, cgroup)
		if l != nil {
			b.links = append(b.links, l)
		}
		if l != nil || err != nil {
			return err
		}
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: h.attach, Program: h.program})
	if err != nil {
		return err
	}
	b.links = append(b.links, l)
	if b.options.PinDir != "" {
		if err := l.Pin(b.linkPin(h)); err != nil {
			return fmt.Errorf("pin the link: %w", err)
		}
	}
	return nil
}

// checkCgroup returns an error for what is no cgroup2 folder, and for the root of the hierarchy.
func checkCgroup(cgroup string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(cgroup, &fs); err != nil {
		return err
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return errors.New("this is not a folder of a cgroup2 file system")
	}
	// Every cgroup but the root has this file (Documentation/admin-guide/cgroup-v2.rst), also where a cgroup namespace
	// shows a sub-folder as its root.
	if _, err := os.Stat(filepath.Join(cgroup, "cgroup.type")); errors.Is(err, os.ErrNotExist) {
		return ErrRootCgroup
	}
	return nil
}

// Detach ends translation in the cgroup, pinned or not. Translated connections live on.
func (b *Balancer) Detach() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.detach()
}

func (b *Balancer) detach() error {
	var errs []error
	for _, l := range b.links {
		if b.options.PinDir != "" {
			errs = append(errs, l.Unpin())
		}
		errs = append(errs, l.Close())
	}
	b.links = nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	return nil
}

// Hooks names the programs that are attached to the cgroup.
func (b *Balancer) Hooks() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	names := []string{}
	for i := range b.links {
		names = append(names, b.hooks()[i].name)
	}
	return names
}

// Close releases what this process holds. Without a PinDir that ends translation; with one it goes on.
func (b *Balancer) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	var errs []error
	for _, l := range b.links {
		errs = append(errs, l.Close())
	}
	b.links = nil
	for _, l := range b.devices {
		errs = append(errs, l.Close())
	}
	clear(b.devices)
	if b.loop.loopback != nil {
		errs = append(errs, b.loop.loopback.Close())
	}
	if b.loop.index != 0 && b.options.PinDir == "" {
		// Without a program the loop leads nowhere. It went with the namespace if that is gone.
		if err := RemoveLoop(b.options.Packets.NetNS); !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	b.loop = loop{}
	for _, f := range b.families() {
		errs = append(errs, f.close())
	}
	for _, m := range []*ebpf.Map{b.insiders, b.clusterIPs, b.namespaces, b.addresses.programs, b.ranges.programs, b.lingering.programs} {
		errs = append(errs, m.Close())
	}
	return errors.Join(append(errs, b.objects.Close(), b.packets.Close(), b.forsake.Close())...)
}

// Counts tells how full the maps of an IP version are.
type Counts struct {
	Frontends        int // frontends for clients inside the cluster
	Entries          int // entries of the services map that are taken, for clients inside and outside
	Backends         int // backends of all frontends together, in either map
	Slots            int // entries of the backends map that are taken, those that wait out the grace period included
	ServicesCapacity int // entries that the services map may hold
	BackendsCapacity int // entries of the backends map that can be taken
}

// Counts tells how full the maps are now.
func (b *Balancer) Counts() (ipv4, ipv6 Counts) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.ipv4.counts(), b.ipv6.counts()
}
