// SPDX-License-Identifier: Apache-2.0

// Package lb is a load balancer in the kernel's socket hooks: a connect(2) to a Service address becomes a connect(2) to
// one of its backends. It knows addresses, not Kubernetes.
//
// This version carries TCP and connected UDP over IPv4, at cgroup/connect4. It keeps no reverse state, so getpeername(2)
// on a translated socket names the backend, and sendto(2) on an unconnected UDP socket is not translated.
package lb

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
	"unsafe"

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
	DefaultServices = 1 << 16
	DefaultBackends = 1 << 18
	DefaultGrace    = time.Second
)

// Options are fixed when a Balancer is loaded. The zero value means the defaults.
type Options struct {
	// Services is how many frontends the services map holds, at 128 bytes each, rounded up to a power of two and at
	// least 4 KiB. 0 means DefaultServices.
	Services int
	// Backends is how many backends the backends map holds for all frontends that have more than three, at 8 bytes
	// each, rounded up to a power of two; eight of them are not used. A frontend with n backends takes n of them
	// rounded up to a power of two, and twice as many while it changes. 0 means DefaultBackends.
	Backends int
	// Grace is how long the backends that a frontend had before a change stay untouched for connects that are under
	// way. 0 means DefaultGrace.
	Grace time.Duration
	// PinDir is a folder on a bpffs under which maps and link are pinned, in a folder named for their layout, so that
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
	if o.Grace < 0 {
		return fmt.Errorf("grace period %v is negative", o.Grace)
	}
	return nil
}

// A Balancer is the program with its maps. Its methods may be called from several goroutines.
type Balancer struct {
	// Set once by Load.
	options Options
	objects connectObjects
	memory  []byte   // the backends map, shared with the program
	slots   []uint64 // the same, as words

	// Guarded by mu.
	mu       sync.Mutex
	link     link.Link      // nil until Attach
	table    *table         // the services map
	regions  *regions       // which of slots are taken
	retired  retiredRegions // which of them wait for their readers
	backends int            // of all frontends together
}

// Load creates the maps and loads the program, attached to nothing yet. With a PinDir that a former Balancer of the same
// sizes left, it continues with that one's frontends.
//
// It needs Linux 5.18 (bpf_set_retval in connect hooks) and CAP_BPF with CAP_NET_ADMIN, as root has.
func Load(options Options) (_ *Balancer, err error) {
	if err := options.validate(); err != nil {
		return nil, err
	}
	b := &Balancer{options: options.withDefaults()}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.Close())
		}
	}()

	spec, err := loadConnect()
	if err != nil {
		return nil, fmt.Errorf("read the embedded object: %w", err)
	}
	maps, err := b.openMaps(spec)
	if err != nil {
		return nil, b.explainLoad(err)
	}
	defer func() {
		for _, m := range maps {
			err = errors.Join(err, m.Close()) // objects has its own copies
		}
	}()
	if err := b.shareMaps(maps); err != nil {
		return nil, err
	}
	if err := errors.Join(
		spec.Variables["hash_seed"].Set(b.table.seed),
		spec.Variables["bucket_mask"].Set(uint32(len(b.table.buckets)-1)),
	); err != nil {
		return nil, fmt.Errorf("constants of the program: %w", err)
	}
	if err := spec.LoadAndAssign(&b.objects, &ebpf.CollectionOptions{MapReplacements: maps}); err != nil {
		return nil, b.explainLoad(err)
	}
	if err := b.takeOver(); err != nil {
		return nil, err
	}
	return b, nil
}

// openMaps makes the maps that are written here, or opens those that are pinned.
func (b *Balancer) openMaps(spec *ebpf.CollectionSpec) (_ map[string]*ebpf.Map, err error) {
	spec.Maps[connectMapServices].MaxEntries = uint32(tableBuckets(b.options.Services) + 1)
	spec.Maps[connectMapBackends].MaxEntries = uint32(b.options.Backends)
	pin := ebpf.MapOptions{}
	if b.options.PinDir != "" {
		if err := os.MkdirAll(b.pinDir(), 0o700); err != nil {
			return nil, fmt.Errorf("pin folder: %w", err)
		}
		pin.PinPath = b.pinDir()
	}
	maps := make(map[string]*ebpf.Map)
	for _, name := range []string{connectMapServices, connectMapBackends} {
		if pin.PinPath != "" {
			spec.Maps[name].Pinning = ebpf.PinByName
		}
		m, err := ebpf.NewMapWithOptions(spec.Maps[name], pin)
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
	case errors.Is(err, ebpf.ErrMapIncompatible):
		return fmt.Errorf("maps pinned in %s have other sizes (delete the folder, or keep its sizes): %w", b.pinDir(), err)
	case errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("load connect4: %w: %w", ErrNotSupported, err)
	case errors.Is(features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval), ebpf.ErrNotSupported):
		return fmt.Errorf("load connect4: bpf_set_retval (Linux 5.18): %w: %w", ErrNotSupported, err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("load connect4: BPF is not permitted here (want root, or CAP_BPF and CAP_NET_ADMIN): %w", err)
	}
	return fmt.Errorf("load connect4: %w", err)
}

// shareMaps shares the maps' memory with this process: writing a word is then one store that a reader sees whole or not
// at all, and takes no system call.
func (b *Balancer) shareMaps(maps map[string]*ebpf.Map) error {
	services, err := shareMap(maps[connectMapServices])
	if err != nil {
		return err
	}
	if b.table, err = newTable(services); err != nil {
		return errors.Join(err, unix.Munmap(services))
	}
	if b.memory, err = shareMap(maps[connectMapBackends]); err != nil {
		return err
	}
	b.slots = unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b.memory))), b.options.Backends)
	b.regions = newRegions(b.options.Backends)
	b.regions.reserve(unused)
	return nil
}

// shareMap gives the memory of an array map, which begins with a page and whose elements follow each other.
func shareMap(m *ebpf.Map) ([]byte, error) {
	page := os.Getpagesize()
	size := (int(m.MaxEntries())*int(m.ValueSize()) + page - 1) / page * page
	memory, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("share the memory of %v: %w", m, err)
	}
	return memory, nil
}

// takeOver makes this process's picture of the maps from what they hold.
func (b *Balancer) takeOver() error {
	for k, e := range b.table.all() {
		w := e.word()
		if b.table.find(k) != e || w.owner() != b.table.owner(k) {
			return fmt.Errorf("frontend %v in %s is not where it belongs (delete the folder)", k.frontend(), b.pinDir())
		}
		inline := w.base() == firstInline || w.base() == otherInline
		if n := w.count(); n > 0 && w.inline() && (!inline || n > maxInline) || n > 0 && !w.inline() && !b.regions.reserve(w.region()) {
			return fmt.Errorf("frontend %v in %s claims backends %d to %d, which are not its own (delete the folder)",
				k.frontend(), b.pinDir(), w.base(), w.base()+n-1)
		}
		b.table.used++
		b.backends += w.count()
	}
	return nil
}

// Attach lets the program see every connect(2) of the processes in a cgroup2 folder and its sub-folders. With a PinDir it
// replaces the program that a former Balancer attached there: no connect goes untranslated meanwhile.
func (b *Balancer) Attach(cgroup string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.link != nil {
		return errors.New("connect4 is attached already")
	}
	if err := checkCgroup(cgroup); err != nil {
		return fmt.Errorf("attach connect4 to %s: %w", cgroup, err)
	}
	l, err := b.attach(cgroup)
	if errors.Is(err, ebpf.ErrNotSupported) {
		err = fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	if err != nil {
		return fmt.Errorf("attach connect4 to %s: %w", cgroup, err)
	}
	b.link = l
	return nil
}

func (b *Balancer) attach(cgroup string) (link.Link, error) {
	if b.options.PinDir != "" {
		l, err := b.replacePinned(cgroup)
		if l != nil || err != nil {
			return l, err
		}
	}
	l, err := link.AttachCgroup(link.CgroupOptions{
		Path:    cgroup,
		Attach:  ebpf.AttachCGroupInet4Connect,
		Program: b.objects.Connect4,
	})
	if err != nil {
		return nil, err
	}
	if b.options.PinDir != "" {
		if err := l.Pin(b.linkPin()); err != nil {
			return nil, errors.Join(fmt.Errorf("pin the link: %w", err), l.Close())
		}
	}
	return l, nil
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
	if b.link == nil {
		return nil
	}
	var unpin error
	if b.options.PinDir != "" {
		unpin = b.link.Unpin()
	}
	err := errors.Join(unpin, b.link.Close())
	b.link = nil
	if err != nil {
		return fmt.Errorf("detach connect4: %w", err)
	}
	return nil
}

// Close releases what this process holds. Without a PinDir that ends translation; with one it goes on.
func (b *Balancer) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	var errs []error
	if b.link != nil {
		errs = append(errs, b.link.Close())
		b.link = nil
	}
	if b.memory != nil {
		errs = append(errs, unix.Munmap(b.memory))
		b.memory, b.slots = nil, nil
	}
	if b.table != nil {
		errs = append(errs, b.table.close())
	}
	return errors.Join(append(errs, b.objects.Close())...)
}

// Counts tells how full the maps are.
type Counts struct {
	Frontends        int // frontends in the services map
	Backends         int // backends of all frontends together, in either map
	Slots            int // entries of the backends map that are taken, those that wait out the grace period included
	ServicesCapacity int // frontends that the services map may hold
	BackendsCapacity int // entries of the backends map that can be taken
}

// Counts tells how full the maps are now.
func (b *Balancer) Counts() Counts {
	b.mu.Lock()
	defer b.mu.Unlock()
	return Counts{
		Frontends:        b.table.used,
		Backends:         b.backends,
		Slots:            b.regions.taken() - entryWords,
		ServicesCapacity: b.options.Services,
		BackendsCapacity: b.options.Backends - entryWords,
	}
}
