// SPDX-License-Identifier: Apache-2.0

package scenarios_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane/agent"
)

// podBridge is the bridge that one pod of each node is on, where clients inside the cluster are known by it.
const podBridge = "cbr0"

// Of whom endpoints see an address of the node, by what proxies can be told of it. The pod is inside the cluster in each; so is what
// listens near, but for where it is not behind the pods' bridge.
var masquerades = []struct {
	name   string
	change func(*clusters.ProxySpec)
	rows   []row
}{
	{"all", func(s *clusters.ProxySpec) { s.MasqueradeAll = true }, []row{
		{name: "ClusterIP", steps: []step{
			{from: anybody, want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
		}},
		{name: "ClusterIP over UDP", ports: []port{{protocol: corev1.ProtocolUDP, port: 80}}, steps: []step{
			{from: anybody, network: "udp", want: "near+far saw node", differs: bySockets("near+far saw itself"), why: unmasqueraded},
		}},
		{name: "ClusterIP over SCTP", ports: sctp, steps: []step{
			{from: anybody, network: "sctp", want: "near+far saw node", differs: bySockets(silence), why: noSCTP},
		}},
		{name: "internal policy Local", service: internalLocal, steps: []step{
			{from: anybody, want: "near saw node", differs: bySockets("near saw itself"), why: unmasqueraded},
		}},
		{name: "external policy Local", service: all(balanced, externalIPs, externalLocal), steps: externally(step{from: fromOutside, want: "near saw outsider"})},
	}},
	{"by the node's range", func(s *clusters.ProxySpec) { s.LocalMode = string(agent.NodeCIDR) }, []row{insideAndOutside("itself")}},
	{"by names of devices", func(s *clusters.ProxySpec) { s.LocalMode, s.PodInterfaces = string(agent.InterfaceNamePrefix), "veth-" }, []row{insideAndOutside("itself")}},
	{"by a bridge", func(s *clusters.ProxySpec) { s.LocalMode, s.PodInterfaces = string(agent.BridgeInterface), podBridge }, []row{insideAndOutside("node")}},
}

// insideAndOutside asks from wherever there is somebody.
func insideAndOutside(near string) row {
	return row{name: "ClusterIP", steps: []step{
		{from: insiders, want: "near+far saw itself"},
		{from: fromOutside, want: "near+far saw node"},
		{change: endpoints(far), from: []string{"near"}, want: "far saw " + near, differs: bySockets("far saw near"), why: unmasqueraded},
	}}
}

// Endpoints see the same clients in every mode, whatever proxies are told of masquerade.
func TestSemanticsOfMasquerade(t *testing.T) {
	for _, m := range masquerades {
		t.Run(m.name, func(t *testing.T) {
			for _, f := range mustOpenFields(t, m.change) {
				for _, s := range f.sites {
					if s.Spec().LocalMode == string(agent.BridgeInterface) {
						s.bridge(t)
					}
				}
				f.run(t, m.rows)
			}
		})
	}
}

// bridge has the client pod be on the pods' bridge, as its only one, instead of behind a device of its own.
func (s *site) bridge(t *testing.T) {
	t.Helper()
	at := s.guests["pod"].addresses[s.number]
	err := s.Enter(func() error {
		veth, err := netlink.LinkByName("veth-client")
		if err != nil {
			return err
		}
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Dst: netlink.NewIPNet(at.AsSlice()), LinkIndex: veth.Attrs().Index}, netlink.RT_FILTER_DST|netlink.RT_FILTER_OIF)
		if err != nil || len(routes) != 1 {
			return fmt.Errorf("%d routes to %s, want one: %w", len(routes), at, err)
		}
		neighbours, err := netlink.NeighList(veth.Attrs().Index, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		// The pod sends to the link address that the node had at its device.
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = podBridge, veth.Attrs().HardwareAddr
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		bridge, err := netlink.LinkByName(podBridge)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(bridge); err != nil {
			return err
		}
		for _, n := range neighbours {
			if n.IP.Equal(at.AsSlice()) {
				n.LinkIndex = bridge.Attrs().Index
				err = errors.Join(err, netlink.NeighSet(&n))
			}
		}
		route := routes[0]
		route.LinkIndex = bridge.Attrs().Index
		return errors.Join(err, netlink.LinkSetMaster(veth, bridge), netlink.RouteDel(&routes[0]), netlink.RouteAdd(&route))
	})
	if err != nil {
		t.Fatalf("%s: put the pod on a bridge: %v", s.mode, err)
	}
}
