// SPDX-License-Identifier: Apache-2.0

package scenarios

import "github.com/plimsoll-bench/plimsoll/scenarios/load"

// udp asks Services by UDP and waits for answers.
type udp struct{}

var _ probing = udp{}

func (udp) Name() string { return "udp" }
func (udp) Doc() string {
	return "a datagram to a Service from a new socket, and the answer, with the server's own work; in guests"
}
func (udp) Targets() []string { return []string{"exchange"} }

func (udp) request(p *probes, _ string) (load.Request, bool) {
	return load.Request{Kind: load.Exchange, Addresses: p.datagrams}, false
}
