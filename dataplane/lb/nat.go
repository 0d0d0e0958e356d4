// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Marks of packets, for the rules of natTable. No other packet has refuseMark but by a chance of one in four billions of those that are
// marked at all. See packet.bpf.c.
const (
	refuseMark     = 0x706c696d // it is to be refused, unless another proxy translates it
	discardMark    = 0x706c6964 // it is to be dropped, unless another proxy does
	sctpMark       = 0x60000000 // it begins an association with the backend whose slot is in the other bits
	sctpMasquerade = 0x10000000
	sctpBits       = 0xf0000000
)

// statusDNAT is the bit of conntrack's status for a translated destination: IPS_DST_NAT.
const statusDNAT = 1 << 5

// natTable is the nftables table of all that is left to the kernel's own NAT.
//
// Note: by netlink, and not by the command nft, so that an agent needs nothing in its container but itself.
func natTable() *nftables.Table {
	return &nftables.Table{Name: natName, Family: nftables.TableFamilyINet}
}

const natName = "plimsoll"

// sctpMap is a map of natTable, from the mark of a packet to a backend: its address, and its port in four bytes.
func sctpMap(keyWords int) *nftables.Set {
	name, address := "sctp4", nftables.TypeIPAddr
	if keyWords == keyWords6 {
		name, address = "sctp6", nftables.TypeIP6Addr
	}
	return &nftables.Set{
		Table: natTable(), Name: name, IsMap: true, KeyType: nftables.TypeMark,
		DataType: nftables.MustConcatSetType(address, nftables.TypeInetService),
	}
}

// Registers of rules. Register 1 is 16 bytes long, and its words have numbers of their own (include/uapi/linux/netfilter/nf_tables.h).
const (
	register          = 1
	registerAfterIPv4 = unix.NFT_REG32_00 + 1
	registerAfterIPv6 = unix.NFT_REG32_00 + 4
)

// KeepNAT installs what the packet programs leave to the kernel: its conntrack and NAT, and the refusals. It replaces what a former
// Balancer left, at once. RemoveNAT takes it away.
//
// Where it was not there before, conntrack may begin with it, and takes the answers to what it has not seen for invalid. So what is invalid
// is dropped only when KeepNAT is called again, which is to be some seconds later; DropsInvalid tells.
func (b *Balancer) KeepNAT() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	has, _ := b.HasNAT() // what is wrong the change says, too, in words that tell a kernel without nf_tables
	err := b.changeNAT(func(nft *nftables.Conn) error {
		if err := addNAT(nft, has); err != nil {
			return err
		}
		for _, f := range b.families() {
			for slot, backend := range f.sctp {
				if err := nft.SetAddElements(sctpMap(f.table.keyWords), sctpElements(slot, backend)); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%w: NAT by nf_tables: %w", ErrNotSupported, err)
	}
	b.loop.chained = false // KeepLoop's chains may have gone with the others
	b.dropsInvalid = has && err == nil
	return err
}

// DropsInvalid tells whether what conntrack takes for invalid is dropped.
func (b *Balancer) DropsInvalid() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.dropsInvalid
}

// changeNAT makes a change of natTable where the devices are.
func (b *Balancer) changeNAT(change func(*nftables.Conn) error) error {
	if b.options.Packets == nil {
		return nil
	}
	return changeNAT(b.options.Packets.NetNS, change)
}

func changeNAT(netNS string, change func(*nftables.Conn) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("packet path: change the nftables table %s: %w", natName, err)
		}
	}()
	var options []nftables.ConnOption
	if netNS != "" {
		ns, err := os.Open(netNS)
		if err != nil {
			return err
		}
		defer ns.Close()
		options = append(options, nftables.WithNetNSFd(int(ns.Fd())))
	}
	nft, err := nftables.New(options...)
	if err != nil {
		return err
	}
	if err := change(nft); err != nil {
		return err
	}
	if err := nft.Flush(); errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: nf_tables: %w", ErrNotSupported, err)
	} else if err != nil {
		return err
	}
	return nil
}

// RemoveNAT removes what KeepNAT installed in the network namespace of a file, or of the process if there is none. Connections through it
// end then, unless another rule keeps conntrack and NAT there. What is not there is none to remove.
func RemoveNAT(netNS string) error {
	return changeNAT(netNS, func(nft *nftables.Conn) error {
		nft.AddTable(natTable())
		nft.DelTable(natTable())
		return nil
	})
}

func addNAT(nft *nftables.Conn, dropInvalid bool) error {
	table := nft.AddTable(natTable())
	sctp4, sctp6 := sctpMap(keyWords4), sctpMap(keyWords6)
	for _, m := range []*nftables.Set{sctp4, sctp6} {
		if err := nft.AddSet(m, nil); err != nil {
			return err
		}
		nft.FlushSet(m)
	}
	chain := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority nftables.ChainPriority, rules ...[]expr.Any) {
		c := nft.AddChain(&nftables.Chain{Table: table, Name: name, Type: kind, Hooknum: hook, Priority: &priority})
		nft.FlushChain(c)
		for _, rule := range rules {
			nft.AddRule(&nftables.Rule{Table: table, Chain: c, Exprs: rule})
		}
	}
	dnat, snat := *nftables.ChainPriorityNATDest, *nftables.ChainPriorityNATSource
	// Subtle: conntrack and NAT are there as long as a rule and chains want them (nf_ct_netns_get), and connections end when none does.
	// So the chains stay, even empty ones, as long as the table does.
	chain("nat-prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, dnat, dnatTo(sctp4, unix.NFPROTO_IPV4, registerAfterIPv4), dnatTo(sctp6, unix.NFPROTO_IPV6, registerAfterIPv6))
	chain("nat-input", nftables.ChainTypeNAT, nftables.ChainHookInput, snat)
	chain("nat-output", nftables.ChainTypeNAT, nftables.ChainHookOutput, dnat)
	chain("nat-postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, snat,
		append(append(isProtocol(SCTP), isMarked(sctpBits, sctpMark|sctpMasquerade)...), &expr.Masq{}))
	// An RST is not one of the ICMP messages whose rate the kernel limits.
	// The chain comes after those by which other proxies translate.
	chain("refuse", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, dnat+10,
		[]expr.Any{
			&expr.Ct{Register: register, Key: expr.CtKeySTATUS},
			mask(statusDNAT),
			&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: word32(0)},
			&expr.Verdict{Kind: expr.VerdictReturn},
		},
		append(isMarked(0xffffffff, discardMark), &expr.Verdict{Kind: expr.VerdictDrop}),
		append(append(isMarked(0xffffffff, refuseMark), isProtocol(TCP)...), &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}),
		// Subtle: to the node itself the kernel sends ICMP of IPv4 here from the address that was asked, which is not the node's, and so
		// not at all (icmp_route_lookup). What is forwarded it answers from its own.
		append(isDevice(expr.MetaKeyIIFNAME, loopIn), &expr.Verdict{Kind: expr.VerdictReturn}),
		append(isMarked(0xffffffff, refuseMark), rejectByICMP))
	// What conntrack takes for invalid it does not translate: it would come to the client from a stranger, who gets an RST, and the
	// connection ends (kubernetes/kubernetes#74839). kube-proxy's iptables mode drops it, too.
	forward := [][]expr.Any{append(isMarked(0xffffffff, refuseMark), rejectByICMP)}
	if dropInvalid {
		forward = append(forward, []expr.Any{
			&expr.Ct{Register: register, Key: expr.CtKeySTATE},
			mask(expr.CtStateBitINVALID),
			&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: word32(0)},
			&expr.Verdict{Kind: expr.VerdictDrop},
		})
	}
	chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, *nftables.ChainPriorityFilter, forward...)
	return nil
}

var rejectByICMP = &expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}

// dnatTo is a rule that sends a packet of SCTP to the backend that a map has for its mark.
func dnatTo(m *nftables.Set, family uint32, port uint32) []expr.Any {
	return append(isProtocol(SCTP),
		&expr.Meta{Key: expr.MetaKeyMARK, Register: register},
		&expr.Lookup{SourceRegister: register, DestRegister: register, IsDestRegSet: true, SetName: m.Name, SetID: m.ID},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: register, RegProtoMin: port},
	)
}

func isProtocol(p Protocol) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{byte(p)}},
	}
}

// isDevice matches the name of the device that a packet came by or goes by, which key says.
func isDevice(key expr.MetaKey, name string) []expr.Any {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return []expr.Any{&expr.Meta{Key: key, Register: register}, &expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: padded}}
}

func isMarked(bits, mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: register},
		mask(bits),
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: word32(mark)},
	}
}

func mask(bits uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 4, Mask: word32(bits), Xor: word32(0)}
}

func word32(w uint32) []byte { return binary.NativeEndian.AppendUint32(nil, w) }

// sctpElements are those of a backend in a slot, with and without masquerade.
func sctpElements(slot int, backend netip.AddrPort) []nftables.SetElement {
	value := binary.BigEndian.AppendUint16(backend.Addr().Unmap().AsSlice(), backend.Port())
	value = append(value, 0, 0)
	return []nftables.SetElement{
		{Key: word32(sctpMark | uint32(slot)), Val: value},
		{Key: word32(sctpMark | sctpMasquerade | uint32(slot)), Val: value},
	}
}

// placeSCTP has the rules know the backends of a frontend that are about to be published, from a slot on.
func (b *Balancer) placeSCTP(f *family, base int, backends []netip.AddrPort) error {
	if len(backends) == 0 {
		return nil
	}
	err := b.changeNAT(func(nft *nftables.Conn) error {
		for i, backend := range backends {
			// What was there before is of a frontend that is no more.
			if old, has := f.sctp[base+i]; has {
				if err := nft.SetDeleteElements(sctpMap(f.table.keyWords), sctpElements(base+i, old)); err != nil {
					return err
				}
			}
			if err := nft.SetAddElements(sctpMap(f.table.keyWords), sctpElements(base+i, backend)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i, backend := range backends {
		f.sctp[base+i] = backend
	}
	return nil
}

// HasNAT tells whether what KeepNAT installed is there: whoever flushes all rules of nftables takes it away.
func (b *Balancer) HasNAT() (has bool, err error) {
	err = b.changeNAT(func(nft *nftables.Conn) error {
		tables, err := nft.ListTablesOfFamily(nftables.TableFamilyINet)
		for _, table := range tables {
			has = has || table.Name == natName
		}
		return err
	})
	return has, err
}
