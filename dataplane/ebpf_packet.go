// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// ebpfPacket is the packet path of package lb alone: Services are translated where their packets arrive, and conntrack rewrites these,
// as with kube-proxy.
type ebpfPacket struct{}

var _ Mode = ebpfPacket{}

func (ebpfPacket) Name() string { return "ebpf-packet" }
func (ebpfPacket) Doc() string {
	return "the embedded eBPF load balancer without its socket hooks: each packet is translated by conntrack, as kube-proxy has it"
}
func (ebpfPacket) Floor() string { return directConntrack{}.Name() }

// Supported loads the programs, attached to nothing, and makes their table where nothing else is.
func (ebpfPacket) Supported(context.Context) error {
	ns, err := clusters.NewNetNS()
	if err != nil {
		return err
	}
	defer ns.Close()
	options := lb.Options{Services: 1, Backends: 1, Packets: &lb.PacketOptions{NetNS: fmt.Sprintf("/proc/self/fd/%d", ns.Fd())}}
	return loadsBalancer(options, func(b *lb.Balancer) error { return b.KeepNAT() })
}

func (m ebpfPacket) Spec(s Settings) clusters.ProxySpec {
	return clusters.ProxySpec{Name: m.Name(), Agent: true, Packets: true, MinSyncPeriod: s.minSyncPeriod()}
}

// Programmed is what the agent counts in its map of frontends.
func (ebpfPacket) Programmed(ctx context.Context, site clusters.Site) (int, error) {
	return frontends(ctx, site)
}

func (ebpfPacket) Chain(context.Context, clusters.Site) ([]netip.AddrPort, error) { return nil, nil }
