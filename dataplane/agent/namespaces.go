// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// eachNetNS calls f with a file of each network namespace of a cgroup's processes, until f returns an error. What ends meanwhile is left out.
func eachNetNS(cgroup string, f func(file string) error) error {
	seen := make(map[uint64]bool)
	return filepath.WalkDir(cgroup, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() {
			return nil // a cgroup that is gone meanwhile
		}
		processes, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return nil // gone, or threaded: its processes are those of its parent
		}
		for pid := range strings.FieldsSeq(string(processes)) {
			ns := "/proc/" + pid + "/ns/net" // pid 0 is out of this container's sight, and has none
			info, err := os.Stat(ns)
			if err != nil {
				continue
			}
			if inode := info.Sys().(*syscall.Stat_t).Ino; !seen[inode] {
				seen[inode] = true
				if err := f(ns); err != nil && !errors.Is(err, os.ErrNotExist) { // else the process is gone
					return err
				}
			}
		}
		return nil
	})
}

// censusPeriod is when all are looked at again: new pods, and those whose addresses have changed. censusPause is the least time between two looks, which
// take some 0.1 ms a namespace.
const (
	censusPeriod = 10 * time.Second
	censusPause  = 100 * time.Millisecond
)

// A census tells the load balancer which addresses packets from the network namespaces of a cgroup's processes have, so that a client at the socket
// is the same one that its packets are.
type census struct {
	balancer *lb.Balancer
	cgroup   string
}

// run looks at all namespaces when one is met that is not known, until ctx ends.
func (c *census) run(ctx context.Context) {
	met := newSignal()
	var watching sync.WaitGroup
	defer watching.Wait()
	watching.Go(func() {
		if err := c.balancer.OnStrangers(ctx, met.give); err != nil {
			klog.ErrorS(err, "New pods are known by their addresses late", "period", censusPeriod)
		}
	})
	again := time.NewTicker(censusPeriod)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-again.C:
		case <-met:
		}
		c.take()
		select {
		case <-ctx.Done():
			return
		case <-time.After(censusPause):
		}
	}
}

// take looks at all namespaces.
func (c *census) take() {
	err := eachNetNS(c.cgroup, func(file string) error {
		return lb.InNetNS(file, func() error {
			cookie, sources, err := lookAround()
			if err != nil {
				klog.ErrorS(err, "Processes of a network namespace have no address to Services with affinity or source ranges", "file", file)
				return nil
			}
			if sources == (lb.Sources{}) {
				return nil // it is being made, or is to have none
			}
			return c.balancer.SetSources(cookie, sources)
		})
	})
	if err != nil {
		klog.ErrorS(err, "Processes of some network namespaces have no address to Services with affinity or source ranges")
	}
}

// lookAround gives the cookie of the thread's network namespace, and the addresses that packets from there have.
func lookAround() (cookie uint64, s lb.Sources, err error) {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, s, fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(socket)
	if cookie, err = unix.GetsockoptUint64(socket, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil {
		return 0, s, fmt.Errorf("cookie of the network namespace: %w", err)
	}
	if s.IPv4, err = source(netlink.FAMILY_V4, anywhere4); err != nil {
		return 0, s, err
	}
	s.IPv6, err = source(netlink.FAMILY_V6, anywhere6)
	return cookie, s, err
}

// Addresses that nobody has (RFC 5737, RFC 3849): what leads there is the way to most.
var anywhere4, anywhere6 = net.IPv4(192, 0, 2, 1), net.ParseIP("2001:db8::1")

// source is the address that packets to the world have, or where there is no way to it the first that is no loopback's or link's. The zero one
// is none.
//
// Subtle: a namespace that chooses another address for its way to a Service is not the same client by packets as at the socket.
func source(family int, world net.IP) (netip.Addr, error) {
	if routes, err := netlink.RouteGet(world); err == nil && len(routes) == 1 {
		if a, ok := netip.AddrFromSlice(routes[0].Src); ok && a.Unmap().IsGlobalUnicast() {
			return a.Unmap(), nil
		}
	}
	addresses, err := netlink.AddrList(nil, family)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list addresses: %w", err)
	}
	for _, listed := range addresses {
		if a, ok := netip.AddrFromSlice(listed.IP); ok && a.Unmap().IsGlobalUnicast() {
			return a.Unmap(), nil
		}
	}
	return netip.Addr{}, nil
}
