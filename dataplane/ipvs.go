// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// ipvs is kube-proxy in IPVS mode.
type ipvs struct{}

var _ Mode = ipvs{}

func (ipvs) Name() string  { return "ipvs" }
func (ipvs) Doc() string   { return "kube-proxy in IPVS mode; needs ip_vs in the kernel" }
func (ipvs) Floor() string { return directConntrack{}.Name() }

// Supported asks for IPVS's netlink family. Where it is missing and the kernel has modules, ip_vs is loaded, as kube-proxy
// itself would do.
func (ipvs) Supported(ctx context.Context) error {
	if _, err := exec.LookPath("ipset"); err != nil {
		return fmt.Errorf("ipset is not installed (plimsoll doctor --install): %w", clusters.ErrNotSupported)
	}
	if _, err := netlink.GenlFamilyGet("IPVS"); err == nil {
		return nil
	}
	why := "the kernel has no ip_vs"
	if modprobe, err := exec.LookPath("modprobe"); err == nil {
		out, err := exec.CommandContext(ctx, modprobe, "ip_vs").CombinedOutput()
		if err == nil {
			return nil
		}
		if text := complaint(out); text != "" {
			why += ": " + text
		}
	}
	return fmt.Errorf("%s: %w", why, clusters.ErrNotSupported)
}

func (m ipvs) Spec(s Settings) clusters.ProxySpec {
	return clusters.ProxySpec{Name: m.Name(), KubeProxy: "ipvs", IPTables: "nft", MinSyncPeriod: s.minSyncPeriod()}
}

// Programmed counts the virtual servers in /proc/net/ip_vs.
func (ipvs) Programmed(_ context.Context, site clusters.Site) (int, error) {
	n := 0
	err := site.Enter(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/ip_vs")
		n = strings.Count(string(b), "\nTCP ")
		return err
	})
	return n, err
}

func (ipvs) Chain(context.Context, clusters.Site) ([]netip.AddrPort, error) { return nil, nil }
