// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"context"
	"fmt"

	"sigs.k8s.io/knftables"
)

// refuseMark is on packets that are to be refused, until they are. No other packet has it but by a chance of one in four billions of
// those that are marked at all.
const refuseMark = 0x706c696d

// natTable is the nftables table of all that is left to the kernel's own NAT.
const natTable = "plimsoll"

// KeepNAT installs what the packet programs leave to the kernel: its conntrack and NAT, and the refusals. It is for the network
// namespace of the calling thread, needs the command nft, and replaces what a former call left, at once. RemoveNAT takes it away:
// connections through it end then, unless another rule keeps conntrack and NAT there.
func KeepNAT(ctx context.Context) error {
	nft, err := knftables.New(knftables.InetFamily, natTable)
	if err != nil {
		return fmt.Errorf("packet path: the command nft: %w", err)
	}
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("NAT of the plimsoll agent, whose packet programs choose the backends")})
	// Subtle: conntrack and NAT are there as long as a rule and chains want them (nf_ct_netns_get), and connections end when none does.
	// None of these is taken away while the table is there, and the chains are empty.
	for _, hook := range []struct {
		hook     knftables.BaseChainHook
		priority knftables.BaseChainPriority
	}{
		{knftables.PreroutingHook, knftables.DNATPriority}, {knftables.InputHook, knftables.SNATPriority},
		{knftables.OutputHook, knftables.DNATPriority}, {knftables.PostroutingHook, knftables.SNATPriority},
	} {
		tx.Add(&knftables.Chain{Name: "nat-" + string(hook.hook), Type: knftables.PtrTo(knftables.NATType), Hook: knftables.PtrTo(hook.hook), Priority: knftables.PtrTo(hook.priority)})
	}
	refuse := &knftables.Chain{Name: "refuse", Type: knftables.PtrTo(knftables.FilterType), Hook: knftables.PtrTo(knftables.PreroutingHook), Priority: knftables.PtrTo(knftables.DNATPriority + "+10")}
	forward := &knftables.Chain{Name: "forward", Type: knftables.PtrTo(knftables.FilterType), Hook: knftables.PtrTo(knftables.ForwardHook), Priority: knftables.PtrTo(knftables.FilterPriority)}
	for _, c := range []*knftables.Chain{refuse, forward} {
		tx.Add(c)
		tx.Flush(c)
	}
	// What conntrack takes for invalid it does not translate: it would come to the client from a stranger, who gets an RST, and the
	// connection ends (kubernetes/kubernetes#74839). kube-proxy's iptables mode drops it, too.
	tx.Add(&knftables.Rule{Chain: forward.Name, Rule: "ct state invalid drop"})
	// An RST is not one of the ICMP messages whose rate the kernel limits.
	tx.Add(&knftables.Rule{Chain: refuse.Name, Rule: knftables.Concat("meta mark", fmt.Sprintf("%#x", refuseMark), "meta l4proto tcp reject with tcp reset")})
	tx.Add(&knftables.Rule{Chain: refuse.Name, Rule: knftables.Concat("meta mark", fmt.Sprintf("%#x", refuseMark), "reject")})
	if err := nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("packet path: install the nftables table %s: %w", natTable, err)
	}
	return nil
}

// RemoveNAT removes what KeepNAT installed, if it is there.
func RemoveNAT(ctx context.Context) error {
	nft, err := knftables.New(knftables.InetFamily, natTable)
	if err != nil {
		return fmt.Errorf("packet path: the command nft: %w", err)
	}
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Delete(&knftables.Table{})
	if err := nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("packet path: remove the nftables table %s: %w", natTable, err)
	}
	return nil
}
