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

// Streams are the TCP sockets that have names for their peers in a map, not in their own storage. Of its elements the first word is a cookie.
func (b *Balancer) Streams() *ebpf.Map { return b.objects.Streams }
