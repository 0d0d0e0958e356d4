// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/nftables"
	"github.com/vishvananda/netns"
)

// PacketOptions are about packets that arrive at devices, from clients that no socket hook has seen.
type PacketOptions struct {
	// KnowsInsiders says that clients inside the cluster can be told from those outside, by SetInsiders or by the device. Without it all
	// are outside, and none gets an address of the node at a Service's own address.
	KnowsInsiders bool
	// NetNS is the file of the network namespace where the devices are. Empty is that of the process.
	NetNS string
}

// loadPackets loads the programs for devices.
func (b *Balancer) loadPackets(spec *ebpf.CollectionSpec, maps map[string]*ebpf.Map) error {
	if err := setConstants(spec, b.tableConstants(), map[constant]uint64{refuseMarkConstant: refuseMark, discardMarkConstant: discardMark,
		loopMarkConstant: loopMark, knowsInsidersConstant: truth(b.options.Packets.KnowsInsiders)}); err != nil {
		return err
	}
	load := func() error {
		return spec.LoadAndAssign(&b.packets, &ebpf.CollectionOptions{MapReplacements: replacements(spec, maps)})
	}
	err := load()
	if errors.Is(err, ebpf.ErrNotSupported) && askForConntrack() == nil {
		err = load()
	}
	if err != nil {
		if errors.Is(err, ebpf.ErrNotSupported) || isOlderThan(6, 7) {
			return fmt.Errorf("load the packet programs (want Linux 6.7 with conntrack, NAT and BTF): %w: %w", ErrNotSupported, err)
		}
		return fmt.Errorf("load the packet programs: %w", err)
	}
	return nil
}

// askForConntrack has a kernel that keeps conntrack and NAT in modules load these, whose functions the packet programs call: by rules that want
// them, in a network namespace that is gone at once.
func askForConntrack() error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine, and its namespace with it
		ns, err := netns.New()
		if err == nil {
			err = errors.Join(changeNAT("", func(nft *nftables.Conn) error { return addNAT(nft, true) }), ns.Close())
		}
		done <- err
	}()
	return <-done
}

// A Device is where packets come from.
type Device struct {
	// Index is the device's in the network namespace of PacketOptions.
	Index int
	// Pods says that only pods of the cluster are behind it. Else it goes by addresses who is.
	Pods bool
}

// AttachDevice has the packets that arrive at a device translated. With a PinDir it replaces the program that a former Balancer
// attached there. The link ends with the device.
func (b *Balancer) AttachDevice(d Device) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.options.Packets == nil {
		return errors.New("the packet programs are not loaded")
	}
	if b.devices[d.Index] != nil {
		return fmt.Errorf("device %d is attached already", d.Index)
	}
	program := b.packets.Ingress
	if d.Pods {
		program = b.packets.IngressPods
	}
	var l link.Link
	err := InNetNS(b.options.Packets.NetNS, func() (err error) {
		l, err = b.attachDevice(d.Index, program, ebpf.AttachTCXIngress)
		return err
	})
	if err != nil {
		if errors.Is(err, ebpf.ErrNotSupported) {
			err = fmt.Errorf("%w (Linux 6.6): %w", ErrNotSupported, err)
		}
		return fmt.Errorf("attach to device %d: %w", d.Index, err)
	}
	b.devices[d.Index] = l
	return nil
}

// attachDevice attaches a program to a device, for what arrives there or, by ebpf.AttachTCXEgress, what leaves.
func (b *Balancer) attachDevice(index int, program *ebpf.Program, at ebpf.AttachType) (link.Link, error) {
	pin := b.devicePin(index)
	if at == ebpf.AttachTCXEgress {
		pin = b.egressPin()
	}
	if b.options.PinDir != "" {
		l, err := replaceDevice(pin, index, program)
		if l != nil || err != nil {
			return l, err
		}
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: program, Attach: at})
	if err != nil {
		return nil, err
	}
	if b.options.PinDir != "" {
		if err := l.Pin(pin); err != nil {
			return nil, errors.Join(fmt.Errorf("pin the link: %w", err), l.Close())
		}
	}
	return l, nil
}

// devicePins begins the names of pinned links to devices, which end with their indexes.
const devicePins = "ingress-"

func (b *Balancer) devicePin(index int) string {
	return filepath.Join(b.pinDir(), fmt.Sprint(devicePins, index))
}

// replaceDevice puts a program in the place of the one that a pinned link attached to a device. It returns nil if there is none, and
// removes a link whose device is gone.
func replaceDevice(pin string, index int, program *ebpf.Program) (link.Link, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open the pinned link: %w", err)
	}
	info, err := l.Info()
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if at := info.TCX(); at == nil || at.Ifindex != uint32(index) {
		return nil, errors.Join(l.Unpin(), l.Close())
	}
	if err := l.Update(program); err != nil {
		return nil, errors.Join(fmt.Errorf("replace the program: %w", err), l.Close())
	}
	return l, nil
}

// DetachDevice ends what AttachDevice began. A device that is not attached is none to detach.
func (b *Balancer) DetachDevice(index int) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.devices[index]
	if l == nil {
		return nil
	}
	delete(b.devices, index)
	var err error
	if b.options.PinDir != "" {
		err = l.Unpin()
	}
	if err := errors.Join(err, l.Close()); err != nil {
		return fmt.Errorf("detach from device %d: %w", index, err)
	}
	return nil
}

// KeepDevices detaches former Balancers' programs from all devices but those that are attached now. Without a PinDir there are none.
func (b *Balancer) KeepDevices() error {
	if b.options.PinDir == "" {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	entries, err := os.ReadDir(b.pinDir())
	if err != nil {
		return fmt.Errorf("look for pinned links: %w", err)
	}
	var errs []error
	for _, e := range entries {
		var index int
		if rest, is := strings.CutPrefix(e.Name(), devicePins); !is {
			continue
		} else if _, err := fmt.Sscan(rest, &index); err != nil || b.devices[index] != nil {
			continue
		}
		errs = append(errs, os.Remove(filepath.Join(b.pinDir(), e.Name())))
	}
	return errors.Join(errs...)
}

// ReleaseHooks detaches former Balancers' programs from the cgroup, where this one has none attached. Without a PinDir there are none.
func (b *Balancer) ReleaseHooks() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.options.PinDir == "" || b.links != nil {
		return nil
	}
	var errs []error
	for _, h := range b.hooks() {
		if err := os.Remove(b.linkPin(h)); !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// SetInsiders says by address where clients inside the cluster are.
func (b *Balancer) SetInsiders(prefixes []netip.Prefix) error {
	if err := setPrefixes(b.insiders, prefixes); err != nil {
		return fmt.Errorf("clients inside the cluster: %w", err)
	}
	return nil
}

// SetClusterIPs says where the cluster's Services have their own addresses. Packets to those that no frontend has are dropped.
func (b *Balancer) SetClusterIPs(prefixes []netip.Prefix) error {
	if err := setPrefixes(b.clusterIPs, prefixes); err != nil {
		return fmt.Errorf("addresses of Services: %w", err)
	}
	return b.chainClusterIPs(prefixes)
}

// InNetNS calls f on a thread in the network namespace of that file, or on the calling one if there is none.
func InNetNS(file string, f func() error) error {
	if file == "" {
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		if err := EnterNetNS(file); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// EnterNetNS moves the calling thread, to which its goroutine is locked, into the network namespace of that file, or nowhere if there is none.
func EnterNetNS(file string) error {
	if file == "" {
		return nil
	}
	ns, err := netns.GetFromPath(file)
	if err != nil {
		return fmt.Errorf("open the network namespace %s: %w", file, err)
	}
	defer ns.Close()
	if err := netns.Set(ns); err != nil {
		return fmt.Errorf("enter the network namespace %s: %w", file, err)
	}
	return nil
}
