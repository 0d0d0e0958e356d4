// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// iptablesLegacy is kube-proxy in iptables mode with the x_tables backend.
type iptablesLegacy struct{ iptables }

var _ Mode = iptablesLegacy{}

func (iptablesLegacy) Name() string { return "iptables-legacy" }
func (iptablesLegacy) Doc() string {
	return "kube-proxy in iptables mode, x_tables backend (iptables-legacy)"
}

func (iptablesLegacy) Supported(ctx context.Context) error { return iptablesSupported(ctx, "legacy") }

func (m iptablesLegacy) Spec(s Settings) clusters.ProxySpec {
	return clusters.ProxySpec{Name: m.Name(), KubeProxy: "iptables", IPTables: "legacy", MinSyncPeriod: s.minSyncPeriod()}
}
