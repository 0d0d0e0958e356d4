// SPDX-License-Identifier: Apache-2.0

package scenarios

import "github.com/plimsoll-bench/plimsoll/scenarios/load"

// first sends the first packet of a flow.
type first struct{}

var _ probing = first{}

func (first) Name() string { return "first" }
func (first) Doc() string {
	return "sendto(2) of a flow's first datagram to a Service, to the server's socket; in guests"
}
func (first) Targets() []string { return []string{"udp"} }

func (first) request(p *probes, _ string) (load.Request, bool) {
	return load.Request{Kind: load.Exchange, Addresses: p.datagrams, OneWay: true}, false
}
