// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// directConntrack is direct on a node whose conntrack and NAT hooks are alive. It is the floor of modes that NAT: what
// those hooks cost by themselves is not the price of a Service.
type directConntrack struct{ direct }

var _ Mode = directConntrack{}

func (directConntrack) Name() string { return "direct-conntrack" }
func (directConntrack) Doc() string {
	return "direct, with an inert table that keeps conntrack and NAT hooks alive; a floor"
}

func (directConntrack) Supported(ctx context.Context) error { return nftables{}.Supported(ctx) }

func (m directConntrack) Spec(Settings) clusters.ProxySpec {
	return clusters.ProxySpec{Name: m.Name(), ConntrackHooks: true}
}
