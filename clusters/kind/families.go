// SPDX-License-Identifier: Apache-2.0

package kind

import (
	"crypto/sha256"
	"net/netip"
	"strings"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// A family is what a cluster's pods and Services have of one version of IP: kind's defaults.
type family struct {
	pods, services netip.Prefix
	loopback       string
}

var (
	ipv4 = family{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("10.96.0.0/16"), "127.0.0.1"}
	ipv6 = family{netip.MustParsePrefix("fd00:10:244::/56"), netip.MustParsePrefix("fd00:10:96::/112"), "::1"}
)

// ipFamily is the plan's.
func (w *world) ipFamily() clusters.IPFamily {
	if w.plan.IPFamily == "" {
		return clusters.IPv4
	}
	return w.plan.IPFamily
}

// families are those of the run's clusters, the one that comes first to them first.
func (w *world) families() []family {
	switch w.ipFamily() {
	case clusters.IPv6:
		return []family{ipv6}
	case clusters.DualStack:
		return []family{ipv4, ipv6}
	}
	return []family{ipv4}
}

// ranges are the clusters' of something, as kind and the agent want them.
func (w *world) ranges(of func(family) netip.Prefix) string {
	var words []string
	for _, f := range w.families() {
		words = append(words, of(f).String())
	}
	return strings.Join(words, ",")
}

func podsOf(f family) netip.Prefix     { return f.pods }
func servicesOf(f family) netip.Prefix { return f.services }

// loopback is where the control plane listens on its own node.
func (w *world) loopback() string { return w.families()[0].loopback }

// networkFlags are what an engine's network for the nodes wants beside its name. Docker makes up no range of IPv6 by itself before
// release 27; a unique local one (RFC 4193) of the run's name is nobody else's.
func (w *world) networkFlags() []string {
	if w.ipFamily() == clusters.IPv4 {
		return nil
	}
	sum := sha256.Sum256([]byte(w.plan.Name))
	address := [16]byte{0xfd}
	copy(address[1:8], sum[:])
	return []string{"--ipv6", "--subnet", netip.PrefixFrom(netip.AddrFrom16(address), 64).String()}
}
