// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"sigs.k8s.io/knftables"
)

// Marks of packets, for the rules of natTable. No other packet has refuseMark but by a chance of one in four billions of those that are
// marked at all. See packet.bpf.c.
const (
	refuseMark     = 0x706c696d // it is to be refused
	sctpMark       = 0x60000000 // it begins an association with the backend whose slot is in the other bits
	sctpMasquerade = 0x10000000
	sctpBits       = 0xf0000000
)

// natTable is the nftables table of all that is left to the kernel's own NAT.
const natTable = "plimsoll"

// natLimit is how long nft may take for a change.
const natLimit = 30 * time.Second

// KeepNAT installs what the packet programs leave to the kernel: its conntrack and NAT, and the refusals. It needs the command nft, and
// replaces what a former Balancer left, at once. RemoveNAT takes it away.
func (b *Balancer) KeepNAT(ctx context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.changeNAT(ctx, func(tx *knftables.Transaction) {
		addNAT(tx)
		for _, f := range b.families() {
			for slot, backend := range f.sctp {
				f.addSCTP(tx, slot, backend)
			}
		}
	})
}

// changeNAT has nft make a change of natTable where the devices are.
func (b *Balancer) changeNAT(ctx context.Context, add func(*knftables.Transaction)) error {
	if b.options.Packets == nil {
		return nil
	}
	return changeNAT(ctx, b.options.Packets.NetNS, add)
}

func changeNAT(ctx context.Context, netNS string, add func(*knftables.Transaction)) error {
	ctx, cancel := context.WithTimeout(ctx, natLimit)
	defer cancel()
	return inNetNS(netNS, func() error {
		nft, err := knftables.New(knftables.InetFamily, natTable)
		if err != nil {
			return fmt.Errorf("packet path: the command nft: %w", err)
		}
		tx := nft.NewTransaction()
		add(tx)
		if err := nft.Run(ctx, tx); err != nil {
			return fmt.Errorf("packet path: change the nftables table %s: %w", natTable, err)
		}
		return nil
	})
}

// RemoveNAT removes what KeepNAT installed in the network namespace of a file, or of the calling thread if there is none. Connections
// through it end then, unless another rule keeps conntrack and NAT there. What is not there is none to remove.
func RemoveNAT(ctx context.Context, netNS string) error {
	return changeNAT(ctx, netNS, func(tx *knftables.Transaction) {
		tx.Add(&knftables.Table{})
		tx.Delete(&knftables.Table{})
	})
}

func addNAT(tx *knftables.Transaction) {
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("NAT of the plimsoll agent, whose packet programs choose the backends")})
	for _, m := range []*knftables.Map{
		{Name: sctpMap4, Type: "mark : ipv4_addr . inet_service"}, {Name: sctpMap6, Type: "mark : ipv6_addr . inet_service"},
	} {
		tx.Add(m)
		tx.Flush(m)
	}
	chain := func(name string, kind knftables.BaseChainType, hook knftables.BaseChainHook, priority knftables.BaseChainPriority, rules ...string) {
		c := &knftables.Chain{Name: name, Type: &kind, Hook: &hook, Priority: &priority}
		tx.Add(c)
		tx.Flush(c)
		for _, rule := range rules {
			tx.Add(&knftables.Rule{Chain: name, Rule: rule})
		}
	}
	// Subtle: conntrack and NAT are there as long as a rule and chains want them (nf_ct_netns_get), and connections end when none does.
	// So the chains stay, even empty ones, as long as the table does.
	chain("nat-prerouting", knftables.NATType, knftables.PreroutingHook, knftables.DNATPriority,
		"meta l4proto sctp dnat ip to meta mark map @"+sctpMap4, "meta l4proto sctp dnat ip6 to meta mark map @"+sctpMap6)
	chain("nat-input", knftables.NATType, knftables.InputHook, knftables.SNATPriority)
	chain("nat-output", knftables.NATType, knftables.OutputHook, knftables.DNATPriority)
	chain("nat-postrouting", knftables.NATType, knftables.PostroutingHook, knftables.SNATPriority,
		fmt.Sprintf("meta l4proto sctp meta mark & %#x == %#x masquerade", sctpBits, sctpMark|sctpMasquerade))
	// An RST is not one of the ICMP messages whose rate the kernel limits.
	chain("refuse", knftables.FilterType, knftables.PreroutingHook, knftables.DNATPriority+"+10",
		fmt.Sprintf("meta mark %#x meta l4proto tcp reject with tcp reset", refuseMark), fmt.Sprintf("meta mark %#x reject", refuseMark))
	// What conntrack takes for invalid it does not translate: it would come to the client from a stranger, who gets an RST, and the
	// connection ends (kubernetes/kubernetes#74839). kube-proxy's iptables mode drops it, too.
	chain("forward", knftables.FilterType, knftables.ForwardHook, knftables.FilterPriority, "ct state invalid drop")
}

// Maps of natTable, from the mark of a packet to the backend.
const sctpMap4, sctpMap6 = "sctp4", "sctp6"

// sctpElements are those of a backend in a slot, with and without masquerade.
func (f *family) sctpElements(slot int, backend netip.AddrPort) []*knftables.Element {
	name := sctpMap4
	if f.table.keyWords == keyWords6 {
		name = sctpMap6
	}
	var all []*knftables.Element
	for _, mark := range []int{sctpMark | slot, sctpMark | sctpMasquerade | slot} {
		all = append(all, &knftables.Element{Map: name, Key: []string{fmt.Sprintf("%#x", mark)}, Value: []string{backend.Addr().String(), fmt.Sprint(backend.Port())}})
	}
	return all
}

func (f *family) addSCTP(tx *knftables.Transaction, slot int, backend netip.AddrPort) {
	for _, e := range f.sctpElements(slot, backend) {
		tx.Add(e)
	}
}

// placeSCTP has the rules know the backends of a frontend that are about to be published, from a slot on.
func (b *Balancer) placeSCTP(f *family, base int, backends []netip.AddrPort) error {
	if len(backends) == 0 {
		return nil
	}
	err := b.changeNAT(context.Background(), func(tx *knftables.Transaction) {
		for i, backend := range backends {
			// What was there before is of a frontend that is no more.
			if old, has := f.sctp[base+i]; has {
				for _, e := range f.sctpElements(base+i, old) {
					tx.Delete(e)
				}
			}
			f.addSCTP(tx, base+i, backend)
		}
	})
	if err != nil {
		return err
	}
	for i, backend := range backends {
		f.sctp[base+i] = backend
	}
	return nil
}
