// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"

	"sigs.k8s.io/knftables"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// nftables is kube-proxy in nftables mode.
type nftables struct{}

var _ Mode = nftables{}

func (nftables) Name() string  { return "nftables" }
func (nftables) Doc() string   { return "kube-proxy in nftables mode" }
func (nftables) Floor() string { return directConntrack{}.Name() }

// Supported adds a table in a namespace of its own. kube-proxy also runs iptables in this mode, once at its start, to remove
// what another mode left.
func (nftables) Supported(ctx context.Context) error {
	if err := iptablesSupported(ctx, "nft"); err != nil {
		return err
	}
	path, err := exec.LookPath("nft")
	if err != nil {
		return fmt.Errorf("nft is not installed (plimsoll doctor --install): %w", clusters.ErrNotSupported)
	}
	return inScratch(func() error {
		out, err := exec.CommandContext(ctx, path, "add table ip probe; add chain ip probe nat { type nat hook prerouting priority dstnat; }").CombinedOutput()
		if err != nil {
			return fmt.Errorf("this kernel has no nf_tables NAT (%s): %w", complaint(out), clusters.ErrNotSupported)
		}
		return nil
	})
}

func (m nftables) Spec(s Settings) clusters.ProxySpec {
	return clusters.ProxySpec{Name: m.Name(), KubeProxy: "nftables", IPTables: "nft", MinSyncPeriod: s.minSyncPeriod()}
}

// Programmed counts the elements of kube-proxy's map service-ips, which has one for each Service port.
func (nftables) Programmed(ctx context.Context, site clusters.Site) (int, error) {
	n := 0
	err := site.Enter(func() error {
		nft, err := knftables.New(knftables.IPv4Family, "kube-proxy")
		if err != nil {
			return err
		}
		elements, err := nft.ListElements(ctx, "map", "service-ips")
		n = len(elements)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("list map service-ips on %s: %w", site.Spec().Name, err)
	}
	return n, nil
}

func (nftables) Chain(context.Context, clusters.Site) ([]netip.AddrPort, error) { return nil, nil }
