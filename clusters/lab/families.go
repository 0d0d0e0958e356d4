// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"net/netip"
	"os"
	"sync"
)

// A family is a node's addresses of one version of IP.
type family struct {
	node, router, client netip.Addr
	pods, services       netip.Prefix
	backends             []netip.Prefix
	forwarding           string // the sysctl that has a namespace forward
}

// Every node has the same addresses: nodes are not connected to each other, so one fleet's endpoints are local on each of
// them. 198.18.0.0/15 and 2001:2::/48 are for benchmarks of network devices (RFC 2544, RFC 5180) and routed nowhere.
var (
	ipv4 = family{
		node:     netip.MustParseAddr("198.18.0.1"),
		router:   netip.MustParseAddr("198.18.0.2"),
		client:   netip.MustParseAddr("198.18.0.10"),
		pods:     netip.MustParsePrefix("198.18.0.0/16"),
		services: netip.MustParsePrefix("198.19.0.0/16"),
		backends: []netip.Prefix{netip.MustParsePrefix("198.18.64.0/18"), netip.MustParsePrefix("198.18.128.0/18")},

		forwarding: "net/ipv4/ip_forward",
	}
	ipv6 = family{
		node:     netip.MustParseAddr("2001:2::1"),
		router:   netip.MustParseAddr("2001:2::2"),
		client:   netip.MustParseAddr("2001:2::10"),
		pods:     netip.MustParsePrefix("2001:2::/56"),
		services: netip.MustParsePrefix("2001:2:0:ff00::/112"),
		backends: []netip.Prefix{netip.MustParsePrefix("2001:2:0:40::/64"), netip.MustParsePrefix("2001:2:0:80::/64")},

		forwarding: "net/ipv6/conf/all/forwarding",
	}
)

// Node is a node's address, and Services the range of Services' addresses, both of IPv4.
func Node() netip.Addr       { return ipv4.node }
func Services() netip.Prefix { return ipv4.services }

// families are those that this kernel speaks, IPv4 first: one that was started with ipv6.disable=1 has IPv4 alone.
var families = sync.OnceValue(func() []family {
	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
		return []family{ipv4}
	}
	return []family{ipv4, ipv6}
})

// each is what families have of something, as the lists that objects and flags want.
func each[T any](of func(family) T) []T {
	var made []T
	for _, f := range families() {
		made = append(made, of(f))
	}
	return made
}

// podRanges are where the pods of a node are.
func podRanges() []string { return each(func(f family) string { return f.pods.String() }) }

// single is the range of one address.
func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
