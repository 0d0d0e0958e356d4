// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// HostPod returns a pod in the host network of a lab's site: its processes have the node's namespace and addresses, and belong to
// the node's cgroup.
func HostPod(s clusters.Site) (clusters.Pod, error) {
	n, err := nodeOf(s)
	if err != nil {
		return nil, err
	}
	p := &pod{node: n, name: "host", address: nodeAddress, ns: n.ns}
	if p.cgroup, err = n.cgroup.Child("pod-" + p.name); err != nil {
		return nil, err
	}
	return p, nil
}

// Outsider returns a host at the far end of a lab's site's uplink, which has an address of its own there and a route to everywhere
// by the node. It forwards nothing, so there is still no way out. Its processes are none of the node's, nor in the node's cgroup.
// A site has one at most.
func Outsider(s clusters.Site, address netip.Addr) (clusters.Pod, error) {
	n, err := nodeOf(s)
	if err != nil {
		return nil, err
	}
	p := &pod{node: n, name: "outsider", address: address, ns: n.outside}
	if p.cgroup, err = n.run.Cgroup.Child("outside-" + n.spec.Name); err != nil {
		return nil, err
	}
	if err := n.settle(address); err != nil {
		return nil, fmt.Errorf("node %s: outsider %s: %w", n.spec.Name, address, err)
	}
	return p, nil
}

func nodeOf(s clusters.Site) (*node, error) {
	n, ok := s.(*node)
	if !ok {
		return nil, errors.New("the site is not a lab's")
	}
	return n, nil
}

// settle gives the far end of the uplink an address and its routes. The node needs none: its default route leads there, whatever the
// address.
func (n *node) settle(address netip.Addr) error {
	near, err := n.ns.Netlink()
	if err != nil {
		return err
	}
	defer near.Close()
	far, err := n.outside.Netlink()
	if err != nil {
		return err
	}
	defer far.Close()
	eth0, err := near.LinkByName("eth0")
	if err != nil {
		return err
	}
	uplink, err := far.LinkByName("uplink")
	if err != nil {
		return err
	}
	if err := far.AddrAdd(uplink, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(address, 32))}); err != nil {
		return fmt.Errorf("add the address: %w", err)
	}
	if err := far.NeighSet(&netlink.Neigh{LinkIndex: uplink.Attrs().Index, State: netlink.NUD_PERMANENT, IP: nodeAddress.AsSlice(), HardwareAddr: eth0.Attrs().HardwareAddr}); err != nil {
		return fmt.Errorf("pin the node's link address: %w", err)
	}
	if err := far.RouteAdd(&netlink.Route{LinkIndex: uplink.Attrs().Index, Gw: nodeAddress.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}); err != nil {
		return fmt.Errorf("add the default route: %w", err)
	}
	return nil
}
