// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// HostPod returns a pod in the host network of a lab's site: its processes have the node's namespace and addresses, and belong to
// the node's cgroup.
func HostPod(s clusters.Site) (clusters.Pod, error) {
	n, err := nodeOf(s)
	if err != nil {
		return nil, err
	}
	p := &pod{node: n, name: "host", addresses: each(func(f family) netip.Addr { return f.node }), ns: n.ns}
	if p.cgroup, err = n.cgroup.Child("pod-" + p.name); err != nil {
		return nil, err
	}
	return p, nil
}

// Outsider forwards nothing, so there is still no way out.
func (n *node) Outsider(addresses ...netip.Addr) (clusters.Pod, error) {
	var err error
	p := &pod{node: n, name: "outsider", addresses: addresses, ns: n.outside}
	if p.cgroup, err = n.run.Cgroup.Child("outside-" + n.spec.Name); err != nil {
		return nil, err
	}
	if err := n.settle(addresses); err != nil {
		return nil, fmt.Errorf("node %s: outsider: %w", n.spec.Name, err)
	}
	return p, nil
}

// Addresses are a lab's pod's own, one of each family, IPv4's first.
func Addresses(p clusters.Pod) ([]netip.Addr, error) {
	of, ok := p.(*pod)
	if !ok {
		return nil, errors.New("the pod is not a lab's")
	}
	return of.addresses, nil
}

func nodeOf(s clusters.Site) (*node, error) {
	n, ok := s.(*node)
	if !ok {
		return nil, errors.New("the site is not a lab's")
	}
	return n, nil
}

// settle gives the far end of the uplink addresses and routes. The node needs none: its default route leads there, whatever the
// address.
func (n *node) settle(addresses []netip.Addr) error {
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
	for _, a := range addresses {
		if err := far.AddrAdd(uplink, address(a)); err != nil {
			return fmt.Errorf("add %s: %w", a, err)
		}
		router := ipv4.node
		if a.Is6() {
			router = ipv6.node
		}
		if err := routeBy(far, uplink, router, eth0); err != nil {
			return err
		}
	}
	return nil
}
