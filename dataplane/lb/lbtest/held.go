// SPDX-License-Identifier: Apache-2.0

package lbtest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Hold is the order of the same name.
//
// Subtle: sockets of one processor have cookies that follow each other; those of two may be apart by a multiple of the map's size, and then
// want the same places.
func (o *Orders) Hold(t Target, _ *struct{}) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return err
	}
	for cpu := 0; ; cpu++ {
		if all.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return err
	}
	defer unix.SchedSetaffinity(0, &all) // it was that before
	for range t.N {
		conn, err := Dial(t.Network, t.Address, patience)
		if err != nil {
			return err
		}
		held := conn.(*net.TCPConn)
		o.held = append(o.held, held)
		if err := held.SetLinger(0); err != nil {
			return err
		}
	}
	return nil
}

// Reconnect is the order of the same name.
func (o *Orders) Reconnect(address string, _ *struct{}) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	return o.onHeld(func(fd int) error {
		// connect(2) to AF_UNSPEC, which package unix does not know, dissolves the connection.
		var unspecified unix.RawSockaddrAny
		if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspecified)), unix.SizeofSockaddrInet4); errno != 0 {
			return fmt.Errorf("dissolve: %w", errno)
		}
		if err := unix.Connect(fd, sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return err
		}
		return nil
	})
}

// HeldPeers is the order of the same name.
func (o *Orders) HeldPeers(_ struct{}, peers *map[string]int) error {
	*peers = map[string]int{}
	return o.onHeld(func(fd int) error {
		peer, err := unix.Getpeername(fd)
		if err != nil {
			return fmt.Errorf("getpeername: %w", err)
		}
		var address netip.AddrPort
		switch peer := peer.(type) {
		case *unix.SockaddrInet4:
			address = netip.AddrPortFrom(netip.AddrFrom4(peer.Addr), uint16(peer.Port))
		case *unix.SockaddrInet6:
			address = netip.AddrPortFrom(netip.AddrFrom16(peer.Addr).Unmap(), uint16(peer.Port))
		}
		(*peers)[address.String()]++
		return nil
	})
}

// LetGo is the order of the same name.
func (o *Orders) LetGo(struct{}, *struct{}) error {
	var errs []error
	for _, conn := range o.held {
		errs = append(errs, conn.Close())
	}
	o.held = nil
	return errors.Join(errs...)
}

func (o *Orders) onHeld(do func(fd int) error) error {
	for _, conn := range o.held {
		raw, err := conn.SyscallConn()
		if err != nil {
			return err
		}
		var failed error
		if err := raw.Control(func(fd uintptr) { failed = do(int(fd)) }); err != nil || failed != nil {
			return errors.Join(err, failed)
		}
	}
	return nil
}
