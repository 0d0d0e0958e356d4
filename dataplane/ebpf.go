// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// ebpf is the embedded load balancer of package lb: Services are translated at connect(2), by hooks on the node's cgroup.
type ebpf struct{}

var _ Mode = ebpf{}

func (ebpf) Name() string { return "ebpf" }
func (ebpf) Doc() string {
	return "the embedded eBPF load balancer: Services are translated at connect(2) by a cgroup hook"
}
func (ebpf) Floor() string { return direct{}.Name() }

// Supported loads the load balancer, attached to nothing.
func (ebpf) Supported(context.Context) error {
	return loadsBalancer(lb.Options{Services: 1, Backends: 1}, func(*lb.Balancer) error { return nil })
}

// loadsBalancer says why a load balancer cannot be loaded, or tried; nil if it can.
func loadsBalancer(options lb.Options, try func(*lb.Balancer) error) error {
	b, err := lb.Load(options)
	if err == nil {
		err = errors.Join(try(b), b.Close())
	}
	if errors.Is(err, lb.ErrNotSupported) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%s: %w", complaint([]byte(err.Error())), clusters.ErrNotSupported)
	}
	return err // the load balancer's own fault
}

func (m ebpf) Spec(s Settings) clusters.ProxySpec {
	return clusters.ProxySpec{Name: m.Name(), Agent: true, PeerNames: s.PeerNames, MinSyncPeriod: s.minSyncPeriod()}
}

// Programmed is what the agent counts in its map of frontends.
func (ebpf) Programmed(ctx context.Context, site clusters.Site) (int, error) {
	return frontends(ctx, site)
}

func frontends(ctx context.Context, site clusters.Site) (int, error) {
	metrics, err := proxyMetrics(ctx, site)
	if err != nil {
		return 0, err
	}
	return int(metrics.sum("plimsoll_lb_frontends")), nil
}

func (ebpf) Chain(context.Context, clusters.Site) ([]netip.AddrPort, error) { return nil, nil }
