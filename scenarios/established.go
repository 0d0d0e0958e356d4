// SPDX-License-Identifier: Apache-2.0

package scenarios

import "github.com/plimsoll-bench/plimsoll/scenarios/load"

// established sends packets of flows that have exchanged some.
type established struct{}

var _ probing = established{}

func (established) Name() string { return "established" }
func (established) Doc() string {
	return "send(2) on a flow to a Service that has exchanged packets both ways, to the server's socket; in guests"
}
func (established) Targets() []string { return []string{"udp", "tcp"} }

func (established) request(p *probes, target string) (load.Request, bool) {
	r := load.Request{Kind: load.Exchange, Addresses: p.datagrams, Kept: true, OneWay: true}
	if target == "tcp" {
		r.Addresses, r.Stream = p.streams, true
	}
	return r, false
}
