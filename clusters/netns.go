// SPDX-License-Identifier: Apache-2.0

package clusters

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// A NetNS is a network namespace that only this process and its children hold: it has no name and no mount, so it is gone
// with the last of them, however they end.
type NetNS struct {
	handle netns.NsHandle
}

// NewNetNS makes an empty network namespace with its loopback link up.
func NewNetNS() (*NetNS, error) {
	n := &NetNS{handle: netns.None()}
	err := onThread(func() error {
		h, err := netns.New()
		if err != nil {
			return fmt.Errorf("make a network namespace (needs CAP_SYS_ADMIN): %w", err)
		}
		n.handle = h
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("set lo up: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// NetNSOf is the network namespace of a process.
func NetNSOf(pid int) (*NetNS, error) {
	h, err := netns.GetFromPid(pid)
	if err != nil {
		return nil, fmt.Errorf("open the network namespace of process %d: %w", pid, err)
	}
	return &NetNS{handle: h}, nil
}

// Do calls f on a locked thread in this namespace. Sockets that f opens and processes that f starts belong to it.
func (n *NetNS) Do(f func() error) error {
	return onThread(func() error {
		if err := netns.Set(n.handle); err != nil {
			return fmt.Errorf("enter the network namespace: %w", err)
		}
		return f()
	})
}

// DialContext opens a connection from inside the namespace. Addresses are literal: nothing is looked up.
func (n *NetNS) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := n.Do(func() error {
		var err error
		// Subtle: a TCP dial to a literal address opens its socket on the calling goroutine, unless Happy Eyeballs splits
		// the dial over goroutines; FallbackDelay < 0 keeps it here.
		conn, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen opens a listening TCP socket inside the namespace.
func (n *NetNS) Listen(ctx context.Context, address string) (net.Listener, error) {
	var l net.Listener
	err := n.Do(func() error {
		var err error
		l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		return err
	})
	return l, err
}

// Netlink opens a netlink handle inside the namespace.
func (n *NetNS) Netlink() (*netlink.Handle, error) {
	return netlink.NewHandleAt(n.handle)
}

// Fd is the namespace's file descriptor, for netlink calls that move links into it.
func (n *NetNS) Fd() int { return int(n.handle) }

// Close lets go of the namespace; it vanishes with the last process in it.
func (n *NetNS) Close() error {
	if !n.handle.IsOpen() {
		return nil
	}
	return n.handle.Close()
}

// onThread runs f on a locked thread and gives the thread its namespace back. A thread that cannot go back is left locked
// and dies with its goroutine.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("read the network namespace: %w", err)
			return
		}
		err = f()
		if back := netns.Set(home); back != nil {
			err = errors.Join(err, fmt.Errorf("return to the network namespace: %w", back))
		} else {
			// Subtle: only a thread that is home again goes back to the scheduler. Children are started with a parent-death
			// signal, which is sent when their *thread* ends, so this thread must live on.
			runtime.UnlockOSThread()
		}
		home.Close()
		done <- err
	}()
	return <-done
}
