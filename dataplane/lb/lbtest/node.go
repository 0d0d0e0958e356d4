// SPDX-License-Identifier: Apache-2.0

package lbtest

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A Node is a Pod that forwards packets between others, each of which is behind a device of its own. None has a way out.
type Node struct {
	*Pod
	addresses []netip.Addr
}

// StartNode starts a node with these addresses.
func StartNode(tb testing.TB, addresses ...string) *Node {
	tb.Helper()
	n := &Node{Pod: StartPod(tb)}
	for _, address := range addresses {
		n.AddAddress(tb, address)
	}
	n.do(tb, "Forward", struct{}{}, nil)
	return n
}

// AddAddress gives the node an address more, and pods that come later a route by it.
func (n *Node) AddAddress(tb testing.TB, address string) {
	tb.Helper()
	a := netip.MustParseAddr(address)
	n.addresses = append(n.addresses, a)
	n.Pod.AddAddress(tb, netip.PrefixFrom(a, a.BitLen()).String())
}

// AddPod starts a pod whose packets arrive at the node's device of that name, and which has a route to everywhere by the node.
func (n *Node) AddPod(tb testing.TB, device string, addresses ...string) *Pod {
	tb.Helper()
	p := StartPod(tb)
	if err := n.join(p, device, addresses); err != nil {
		tb.Fatalf("join a pod to the node: %v", err)
	}
	return p
}

func (n *Node) join(p *Pod, device string, addresses []string) error {
	inside, err := netns.GetFromPid(p.pid)
	if err != nil {
		return err
	}
	defer inside.Close()
	outside, err := netns.GetFromPid(n.pid)
	if err != nil {
		return err
	}
	defer outside.Close()
	pod, err := netlink.NewHandleAt(inside)
	if err != nil {
		return err
	}
	defer pod.Close()
	node, err := netlink.NewHandleAt(outside)
	if err != nil {
		return err
	}
	defer node.Close()

	attrs := netlink.NewLinkAttrs()
	attrs.Name = device
	if err := node.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(inside))}); err != nil {
		return err
	}
	near, err := setUp(node, device)
	if err != nil {
		return err
	}
	far, err := setUp(pod, "eth0")
	if err != nil {
		return err
	}
	for _, a := range addresses {
		address := netip.MustParseAddr(a)
		whole := &net.IPNet{IP: address.AsSlice(), Mask: net.CIDRMask(address.BitLen(), address.BitLen())}
		if err := pod.AddrAdd(far, &netlink.Addr{IPNet: whole, Flags: unix.IFA_F_NODAD}); err != nil {
			return err
		}
		if err := neighbours(node, near, far, address); err != nil {
			return err
		}
		if err := node.RouteAdd(&netlink.Route{LinkIndex: near.Attrs().Index, Dst: whole, Scope: netlink.SCOPE_LINK}); err != nil {
			return err
		}
	}
	for _, address := range n.addresses {
		if err := neighbours(pod, far, near, address); err != nil {
			return err
		}
		gateway := &netlink.Route{LinkIndex: far.Attrs().Index, Gw: address.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
		if err := pod.RouteAdd(gateway); err != nil {
			return fmt.Errorf("route by %v: %w", address, err)
		}
	}
	return nil
}

// neighbours has who is behind link know the address of its peer for good.
func neighbours(h *netlink.Handle, link, peer netlink.Link, address netip.Addr) error {
	return h.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: address.AsSlice(), HardwareAddr: peer.Attrs().HardwareAddr})
}

func setUp(h *netlink.Handle, name string) (netlink.Link, error) {
	link, err := h.LinkByName(name)
	if err != nil {
		return nil, err
	}
	return link, h.LinkSetUp(link)
}

// PID is the pod's process.
func (p *Pod) PID() int { return p.pid }

// NetNS is the file of the pod's network namespace.
func (p *Pod) NetNS() string { return fmt.Sprintf("/proc/%d/ns/net", p.pid) }

// Enter calls f on a thread in the pod's network namespace.
func (p *Pod) Enter(tb testing.TB, f func() error) {
	tb.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
		ns, err := netns.GetFromPid(p.pid)
		if err == nil {
			defer ns.Close()
			err = netns.Set(ns)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		tb.Fatal(err)
	}
}

// Forward is StartNode's order.
func (*Orders) Forward(struct{}, *struct{}) error {
	for _, setting := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+setting, []byte("1"), 0); err != nil {
			return err
		}
	}
	return nil
}
