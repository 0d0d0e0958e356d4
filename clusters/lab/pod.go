// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// pod is a network namespace behind a veth pair of its node.
type pod struct {
	node      *node
	name      string
	addresses []netip.Addr // one of each family, IPv4 first
	ns        *clusters.NetNS
	cgroup    *host.Cgroup
}

var _ clusters.Pod = (*pod)(nil)

// A home is where a pod is reached by one family: it answers on every address of owned, of which address is the one on its link.
type home struct {
	family
	address netip.Addr
	owned   netip.Prefix
}

func (n *node) addPod(name string, homes ...home) (*pod, error) {
	p := &pod{node: n, name: name}
	var err error
	if p.cgroup, err = n.cgroup.Child("pod-" + name); err != nil {
		return nil, err
	}
	if p.ns, err = newNetNS(); err != nil {
		return nil, err
	}
	if err := n.connect(p, homes); err != nil {
		return nil, errors.Join(fmt.Errorf("connect pod %s: %w", name, err), p.ns.Close())
	}
	return p, nil
}

// connect lays a veth pair between node and pod.
func (n *node) connect(p *pod, homes []home) error {
	outside, err := n.ns.Netlink()
	if err != nil {
		return err
	}
	defer outside.Close()
	inside, err := p.ns.Netlink()
	if err != nil {
		return err
	}
	defer inside.Close()
	veth, eth0, err := addVeth(outside, inside, "veth-"+p.name, "eth0", p.ns)
	if err != nil {
		return err
	}
	for _, h := range homes {
		p.addresses = append(p.addresses, h.address)
		if err := settleIn(inside, eth0, veth, h); err != nil {
			return fmt.Errorf("inside: %w", err)
		}
		if err := leadTo(outside, veth, eth0, h); err != nil {
			return fmt.Errorf("outside: %w", err)
		}
		if h.address.Is6() && !h.owned.IsSingleIP() {
			// Subtle: a local route makes no address that IPv6 sockets may be bound to, as it does for IPv4.
			if err := sysctl(p.ns, "net/ipv6/ip_nonlocal_bind", "1"); err != nil {
				return err
			}
		}
	}
	return nil
}

// settleIn does the pod's side, in the shape that most CNI plug-ins use: one address and a default route to the node.
func settleIn(h *netlink.Handle, eth0, veth netlink.Link, at home) error {
	if err := h.AddrAdd(eth0, address(at.address)); err != nil {
		return fmt.Errorf("add the address: %w", err)
	}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: ipNet(single(at.node)), Scope: netlink.SCOPE_LINK}); err != nil {
		return fmt.Errorf("add the route to the node: %w", err)
	}
	if err := routeBy(h, eth0, at.node, veth); err != nil {
		return err
	}
	if at.owned.IsSingleIP() {
		return nil
	}
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	// A local route makes the pod answer on the whole range, so that every Service can have endpoints of its own without
	// an address each on the link.
	local := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: ipNet(at.owned), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}
	if err := h.RouteAdd(local); err != nil {
		return fmt.Errorf("add the range: %w", err)
	}
	return nil
}

// leadTo does the node's side: routes to the pod's addresses.
func leadTo(h *netlink.Handle, veth, eth0 netlink.Link, at home) error {
	routes := []*netlink.Route{{LinkIndex: veth.Attrs().Index, Dst: ipNet(single(at.address)), Scope: netlink.SCOPE_LINK}}
	if !at.owned.IsSingleIP() {
		// Subtle: on a plain link route the node would ask for each of the range's addresses and keep an entry for each;
		// by way of the pod's own address it keeps one neighbour, as with one address per pod.
		routes = append(routes, &netlink.Route{LinkIndex: veth.Attrs().Index, Dst: ipNet(at.owned), Gw: at.address.AsSlice(), Flags: int(netlink.FLAG_ONLINK)})
	}
	for _, r := range routes {
		if err := h.RouteAdd(r); err != nil {
			return fmt.Errorf("add the route to %s: %w", r.Dst, err)
		}
	}
	return pinNeighbour(h, veth, at.address, eth0)
}

func (p *pod) Name() string        { return p.name }
func (p *pod) Address() netip.Addr { return p.addresses[0] }
func (p *pod) Cgroup() string      { return p.cgroup.Dir }

func (p *pod) Start(ctx context.Context, args ...string) (clusters.Process, error) {
	return p.node.run.Start(host.Command{
		Name:   p.node.spec.Name + "/" + p.name,
		Argv:   append([]string{p.node.program}, args...),
		NetNS:  p.ns,
		Cgroup: p.cgroup,
		Log:    filepath.Join(p.node.dir, p.name+".log"),
		Pipes:  true,
	})
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
