// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"

	"sigs.k8s.io/knftables"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// nftables is kube-proxy in nftables mode.
type nftables struct{}

var _ Mode = nftables{}

func (nftables) Name() string  { return "nftables" }
func (nftables) Doc() string   { return "kube-proxy in nftables mode" }
func (nftables) Floor() string { return directConntrack{}.Name() }

// Supported adds and lists a table in a namespace of its own.
func (nftables) Supported(ctx context.Context) error {
	path, err := exec.LookPath("nft")
	if err != nil {
		return fmt.Errorf("nft is not installed (plimsoll doctor --install): %w", clusters.ErrNotSupported)
	}
	return inScratch(func() error {
		out, err := exec.CommandContext(ctx, path, "add table ip probe; add chain ip probe nat { type nat hook prerouting priority dstnat; }").CombinedOutput()
		if err != nil {
			return fmt.Errorf("this kernel has no nf_tables NAT (%s): %w", strings.TrimSpace(string(out)), clusters.ErrNotSupported)
		}
		return nil
	})
}

func (m nftables) Spec(s Settings) clusters.ProxySpec {
	return clusters.ProxySpec{Name: m.Name(), KubeProxy: "nftables", MinSyncPeriod: s.minSyncPeriod()}
}

// Programmed counts the elements of kube-proxy's map service-ips, which has one for each Service port.
func (nftables) Programmed(ctx context.Context, site clusters.Site) (int, bool, error) {
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
		return 0, true, fmt.Errorf("list map service-ips on %s: %w", site.Spec().Name, err)
	}
	return n, true, nil
}

func (nftables) Chain(context.Context, clusters.Site) ([]netip.AddrPort, error) { return nil, nil }
