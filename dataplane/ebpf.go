// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	ciliumebpf "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// ebpf is the embedded load balancer of package lb: Services are translated at connect(2), by hooks on the node's cgroup.
type ebpf struct{}

var _ Mode = ebpf{}

func (ebpf) Name() string { return "ebpf" }
func (ebpf) Doc() string {
	return "the embedded eBPF load balancer: Services are translated at connect(2) by a cgroup hook"
}
func (ebpf) Floor() string { return direct{}.Name() }

// Supported loads the smallest program of the kind that the load balancer attaches, and asks for the helper by which it
// refuses (Linux 6.1 or newer).
func (ebpf) Supported(context.Context) error {
	prog, err := ciliumebpf.NewProgram(&ciliumebpf.ProgramSpec{
		Type: ciliumebpf.CGroupSockAddr, AttachType: ciliumebpf.AttachCGroupInet4Connect, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		return fmt.Errorf("load a program for cgroup connect4 (needs root and a kernel with CONFIG_CGROUP_BPF): %w: %w", errors.New(complaint([]byte(err.Error()))), clusters.ErrNotSupported)
	}
	if err := prog.Close(); err != nil {
		return err
	}
	if err := features.HaveProgramHelper(ciliumebpf.CGroupSockAddr, asm.FnSetRetval); err != nil {
		return fmt.Errorf("the kernel has no bpf_set_retval (Linux 6.1 or newer): %w", clusters.ErrNotSupported)
	}
	return nil
}

func (m ebpf) Spec(s Settings) clusters.ProxySpec {
	return clusters.ProxySpec{Name: m.Name(), Agent: true, MinSyncPeriod: s.minSyncPeriod()}
}

// Programmed is what the agent counts in its map of frontends.
func (ebpf) Programmed(ctx context.Context, site clusters.Site) (int, error) {
	metrics, err := proxyMetrics(ctx, site)
	if err != nil {
		return 0, err
	}
	return int(metrics.sum("plimsoll_lb_frontends")), nil
}

func (ebpf) Chain(context.Context, clusters.Site) ([]netip.AddrPort, error) { return nil, nil }
