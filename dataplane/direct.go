// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"net/netip"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// direct carries no Services: clients connect to a backend's own address on a clean node. It is the floor of modes that
// do without conntrack.
type direct struct{}

var _ Mode = direct{}

func (direct) Name() string  { return "direct" }
func (direct) Doc() string   { return "no Service: the backend's own address on a clean node; a floor" }
func (direct) Floor() string { return "" }

func (direct) Supported(context.Context) error { return nil }

func (m direct) Spec(Settings) clusters.ProxySpec { return clusters.ProxySpec{Name: m.Name()} }

func (direct) Programmed(context.Context, clusters.Site) (int, error) { return 0, nil }

func (direct) Chain(context.Context, clusters.Site) ([]netip.AddrPort, error) { return nil, nil }
