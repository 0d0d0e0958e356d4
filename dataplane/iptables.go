// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"

	goiptables "github.com/coreos/go-iptables/iptables"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// iptables is kube-proxy in iptables mode with the nf_tables backend, as current distributions ship it.
type iptables struct{}

var _ Mode = iptables{}

func (iptables) Name() string  { return "iptables" }
func (iptables) Doc() string   { return "kube-proxy in iptables mode, nf_tables backend (iptables-nft)" }
func (iptables) Floor() string { return directConntrack{}.Name() }

func (iptables) Supported(ctx context.Context) error { return iptablesSupported(ctx, "nft") }

func (m iptables) Spec(s Settings) clusters.ProxySpec {
	return clusters.ProxySpec{Name: m.Name(), KubeProxy: "iptables", IPTables: "nft", MinSyncPeriod: s.minSyncPeriod()}
}

func (m iptables) Programmed(ctx context.Context, site clusters.Site) (int, error) {
	chain, err := m.Chain(ctx, site)
	return len(chain), err
}

// Chain reads KUBE-SERVICES, which every new connection walks from its head. kube-proxy fills it from a Go map, so the
// order is another one after each sync.
func (iptables) Chain(_ context.Context, site clusters.Site) ([]netip.AddrPort, error) {
	var rules []string
	err := site.Enter(func() error {
		ipt, err := goiptables.New(goiptables.Path(site.IPTables()))
		if err != nil {
			return err
		}
		rules, err = ipt.List("nat", "KUBE-SERVICES")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list KUBE-SERVICES on %s: %w", site.Spec().Name, err)
	}
	return parseKubeServices(rules), nil
}

// parseKubeServices picks the ClusterIP rules out of `iptables -S KUBE-SERVICES`, in their order. A Service port has one
// rule there: a jump to its own chain.
func parseKubeServices(rules []string) []netip.AddrPort {
	var chain []netip.AddrPort
	for _, rule := range rules {
		fields := strings.Fields(rule)
		var address, port string
		service := false
		for i := 0; i+1 < len(fields); i++ {
			switch fields[i] {
			case "-d":
				address = strings.TrimSuffix(fields[i+1], "/32")
			case "--dport":
				port = fields[i+1]
			case "-j":
				service = strings.HasPrefix(fields[i+1], "KUBE-SVC-") || strings.HasPrefix(fields[i+1], "KUBE-SVL-")
			}
		}
		if ap, err := netip.ParseAddrPort(address + ":" + port); service && err == nil {
			chain = append(chain, ap)
		}
	}
	return chain
}

// iptablesSupported lists an empty table through the backend's own command, in a namespace of its own.
func iptablesSupported(ctx context.Context, backend string) error {
	command := "xtables-" + backend + "-multi"
	path, err := exec.LookPath(command)
	if err != nil {
		return fmt.Errorf("%s is not installed (plimsoll doctor --install): %w", command, clusters.ErrNotSupported)
	}
	return inScratch(func() error {
		cmd := exec.CommandContext(ctx, path, "iptables", "-t", "nat", "-S")
		// Not the host's lock, which somebody may hold.
		cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE="+os.DevNull)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("this kernel has no NAT table for iptables-%s (%s): %w", backend, complaint(out), clusters.ErrNotSupported)
		}
		return nil
	})
}
