// SPDX-License-Identifier: Apache-2.0

package lb

import "github.com/cilium/ebpf"

// RefuseMark is on packets that are to be refused, and DiscardMark on those that are to be dropped if no other proxy wants them.
const (
	RefuseMark  = refuseMark
	DiscardMark = discardMark
)

// PacketPrograms are the programs for devices, by name.
func (b *Balancer) PacketPrograms() map[string]*ebpf.Program {
	return map[string]*ebpf.Program{packetProgIngress: b.packets.Ingress, packetProgIngressPods: b.packets.IngressPods}
}
