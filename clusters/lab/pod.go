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
	node    *node
	name    string
	address netip.Addr
	ns      *clusters.NetNS
	cgroup  *host.Cgroup
}

var _ clusters.Pod = (*pod)(nil)

// addPod makes a pod that answers on every address of owned, of which address is the one on its link.
func (n *node) addPod(name string, address netip.Addr, owned netip.Prefix) (*pod, error) {
	p := &pod{node: n, name: name, address: address}
	var err error
	if p.cgroup, err = n.cgroup.Child("pod-" + name); err != nil {
		return nil, err
	}
	if p.ns, err = clusters.NewNetNS(); err != nil {
		return nil, err
	}
	if err := n.connect(p, owned); err != nil {
		return nil, errors.Join(fmt.Errorf("connect pod %s: %w", name, err), p.ns.Close())
	}
	return p, nil
}

// connect lays a veth pair between node and pod, with routes in the shape that most CNI plug-ins use: the pod has one
// address and a default route to the node, the node a route to the pod's addresses.
func (n *node) connect(p *pod, owned netip.Prefix) error {
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

	host, eth0, err := addVeth(outside, inside, "veth-"+p.name, "eth0", p.ns)
	if err != nil {
		return err
	}
	lo, err := inside.LinkByName("lo")
	if err != nil {
		return err
	}
	routes := []*netlink.Route{{LinkIndex: host.Attrs().Index, Dst: ipNet(netip.PrefixFrom(p.address, 32)), Scope: netlink.SCOPE_LINK}}
	if !owned.IsSingleIP() {
		// Subtle: on a plain link route the node would ask by ARP for each of the range's addresses and keep an entry for
		// each; by way of the pod's own address it keeps one neighbour, as with one address per pod.
		routes = append(routes, &netlink.Route{LinkIndex: host.Attrs().Index, Dst: ipNet(owned), Gw: p.address.AsSlice(), Flags: int(netlink.FLAG_ONLINK)})
		// A local route makes the pod answer on the whole range, so that every Service can have endpoints of its own without
		// an address each on the link.
		local := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: ipNet(owned), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}
		if err := inside.RouteAdd(local); err != nil {
			return fmt.Errorf("add the pod's range: %w", err)
		}
	}
	steps := []func() error{
		func() error {
			return inside.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(p.address, 32))})
		},
		func() error {
			return inside.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: ipNet(netip.PrefixFrom(nodeAddress, 32)), Scope: netlink.SCOPE_LINK})
		},
		func() error {
			return inside.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: nodeAddress.AsSlice()})
		},
	}
	for _, r := range routes {
		steps = append(steps, func() error { return outside.RouteAdd(r) })
	}
	for i, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	// Both ends know each other's link address for good: an ARP exchange in the middle of a visit would be an outlier that has
	// nothing to do with Services.
	if err := outside.NeighSet(&netlink.Neigh{LinkIndex: host.Attrs().Index, State: netlink.NUD_PERMANENT, IP: p.address.AsSlice(), HardwareAddr: eth0.Attrs().HardwareAddr}); err != nil {
		return fmt.Errorf("pin the pod's link address: %w", err)
	}
	if err := inside.NeighSet(&netlink.Neigh{LinkIndex: eth0.Attrs().Index, State: netlink.NUD_PERMANENT, IP: nodeAddress.AsSlice(), HardwareAddr: host.Attrs().HardwareAddr}); err != nil {
		return fmt.Errorf("pin the node's link address: %w", err)
	}
	return nil
}

func (p *pod) Name() string        { return p.name }
func (p *pod) Address() netip.Addr { return p.address }
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
