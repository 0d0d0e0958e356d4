// SPDX-License-Identifier: Apache-2.0

package scenarios

import "github.com/plimsoll-bench/plimsoll/scenarios/load"

// nodeport connects to NodePorts from outside the node.
type nodeport struct{}

var _ probing = nodeport{}

func (nodeport) Name() string { return "nodeport" }
func (nodeport) Doc() string {
	return "connect(2) to a Service's NodePort from beyond the node's uplink; in guests"
}
func (nodeport) Targets() []string { return []string{"outside"} }

func (nodeport) request(p *probes, _ string) (load.Request, bool) {
	return load.Request{Addresses: p.nodePorts}, true
}
