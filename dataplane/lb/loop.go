// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The loop is the way by which the packets of the node's own processes come to the packet programs, which see what arrives at a device:
// a pair of devices, of which one sends to the other. A rule marks what is sent to a Service, and the mark's routes lead to the loop.
// What arrives there is translated and forwarded as if it came from elsewhere.
//
// Note: routes to the Services' addresses were tried on paper. Whoever shares an address with one would go by them too, as another node
// that is some Service's external address; and the source address would be this code's to choose.
const (
	loopOut  = "plimsoll0"    // where packets leave
	loopIn   = "plimsoll1"    // where they arrive
	loopMark = 0x504c494d     // of packets on their way between the two
	loopRule = 99             // the priority of the mark's rule: before those of tunnels that take all but what has their own mark
	loopWays = loopMark >> 16 // the table of the mark's routes
)

// IsLoop tells whether a device is KeepLoop's by its name.
func IsLoop(device string) bool { return device == loopOut || device == loopIn }

// loopMAC is that of both devices: without ARP a device sends to its own. packet.bpf.c has it, too.
var loopMAC = net.HardwareAddr{2, 'p', 'l', 'i', 'm', 's'}

// A loop is what a Balancer knows of it. The zero value is none.
type loop struct {
	index     int               // of the device where packets arrive; 0: there is no loop
	loopback  link.Link         // nil: none
	chained   bool              // whether natTable has its chains
	frontends map[Frontend]bool // those of scope Outside that the chains know
}

// KeepLoop has what the node's own processes send to Services seen by the packet programs, too: to the prefixes of SetClusterIPs, and to
// frontends of scope Outside. It does nothing where all of this is, brings back what somebody removed, and takes over what a former
// Balancer left. KeepNAT comes first. RemoveLoop takes it away, and so does Close without a PinDir.
func (b *Balancer) KeepLoop() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.options.Packets == nil {
		return errors.New("the packet programs are not loaded")
	}
	if err := b.keepLoop(); errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("loop: %w: %w", ErrNotSupported, err)
	} else if err != nil {
		return fmt.Errorf("loop: %w", err)
	}
	return nil
}

func (b *Balancer) keepLoop() error {
	return InNetNS(b.options.Packets.NetNS, func() error {
		index, err := makeLoop()
		if err != nil {
			return err
		}
		if gone := b.devices[b.loop.index]; gone != nil && b.loop.index != index {
			delete(b.devices, b.loop.index)
			if b.options.PinDir != "" {
				err = gone.Unpin()
			}
			if err := errors.Join(err, gone.Close()); err != nil {
				return fmt.Errorf("forget the former %s: %w", loopIn, err)
			}
		}
		if err := b.packets.LoopDevice.Set(uint32(index)); err != nil {
			return fmt.Errorf("have packets go to %s: %w", loopIn, err)
		}
		if b.devices[index] == nil {
			l, err := b.attachDevice(index, b.packets.IngressNode, ebpf.AttachTCXIngress)
			if err != nil {
				return fmt.Errorf("attach to %s: %w", loopIn, err)
			}
			b.devices[index] = l
		}
		b.loop.index = index
		if b.loop.loopback == nil {
			if b.loop.loopback, err = b.attachLoopback(); err != nil {
				return fmt.Errorf("attach to loopback: %w", err)
			}
		}
		if b.loop.chained {
			return nil
		}
		return b.chainLoop()
	})
}

// attachLoopback has what is sent to addresses of the node itself go by the loop, too, if it is marked.
func (b *Balancer) attachLoopback() (link.Link, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	return b.attachDevice(lo.Attrs().Index, b.packets.EgressLoopback, ebpf.AttachTCXEgress)
}

// egressPin is where attachLoopback's link is pinned.
func (b *Balancer) egressPin() string { return filepath.Join(b.pinDir(), "egress-loopback") }

// makeLoop makes what is not there of the loop's devices and routes, and returns the index of the one where packets arrive.
func makeLoop() (int, error) {
	in, err := makeLoopDevices()
	if err != nil {
		return 0, err
	}
	out, err := netlink.LinkByName(loopOut)
	if err != nil {
		return 0, err
	}
	families := map[int]*net.IPNet{netlink.FAMILY_V4: {IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}}
	if off, err := IsIPv6Off(); err != nil {
		return 0, err
	} else if !off {
		families[netlink.FAMILY_V6] = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		for _, device := range []string{loopOut, loopIn} { // which were made while IPv6 was off, perhaps
			if err := os.WriteFile(devConf(6, device, disableIPv6), []byte("0"), 0); err != nil {
				return 0, err
			}
		}
	}
	for family, everywhere := range families {
		route := &netlink.Route{LinkIndex: out.Attrs().Index, Dst: everywhere, Table: loopWays, Family: family, Scope: netlink.SCOPE_LINK}
		if err := netlink.RouteReplace(route); err != nil {
			return 0, fmt.Errorf("route by %s: %w", loopOut, err)
		}
		if err := netlink.RuleAdd(loopRuleOf(family)); err != nil && !errors.Is(err, unix.EEXIST) {
			return 0, fmt.Errorf("rule for the routes by %s: %w", loopOut, err)
		}
	}
	return in.Attrs().Index, nil
}

const disableIPv6 = "disable_ipv6"

// IsIPv6Off tells whether the thread's network namespace has no IPv6: the kernel was started without (ipv6.disable=1), or disable_ipv6 is set
// for each of its devices, those of loops left aside. IPv4 cannot be off.
func IsIPv6Off() (bool, error) {
	settings, err := filepath.Glob(devConf(6, "*", disableIPv6))
	if err != nil {
		return false, err
	}
	seen := false
	for _, file := range settings {
		device := filepath.Base(filepath.Dir(file))
		if slices.Contains([]string{"all", "default", "lo", loopOut, loopIn}, device) {
			continue
		}
		value, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			continue // the device is gone
		} else if err != nil {
			return false, fmt.Errorf("look whether IPv6 is off: %w", err)
		}
		if !bytes.HasPrefix(value, []byte("1")) {
			return false, nil
		}
		seen = true
	}
	return seen || len(settings) == 0, nil
}

func loopRuleOf(family int) *netlink.Rule {
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Mark, rule.Table = family, loopRule, loopMark, loopWays
	return rule
}

// makeLoopDevices returns the device where packets arrive.
func makeLoopDevices() (netlink.Link, error) {
	in, err := netlink.LinkByName(loopIn)
	if _, none := err.(netlink.LinkNotFoundError); none {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = loopOut, loopMAC
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: loopIn, PeerHardwareAddr: loopMAC}); err != nil {
			return nil, fmt.Errorf("make %s and %s: %w", loopOut, loopIn, err)
		}
		in, err = netlink.LinkByName(loopIn)
	}
	if err != nil {
		return nil, err
	}
	if in.Type() != "veth" {
		return nil, fmt.Errorf("%s is somebody else's", loopIn)
	}
	out, err := netlink.LinkByName(loopOut)
	if err != nil {
		return nil, err
	}
	// The source of what arrives is the node's own address, and the way back to it another one. Where sources are checked for all
	// devices (net.ipv4.conf.all.rp_filter), the kernel lets them pass at a device that has an address, whichever it is. These settings are
	// made each time: udev may give a new device those of net.ipv4.conf.*, a while after it came.
	for setting, value := range map[string]string{"accept_local": "1", "rp_filter": "2", "forwarding": "1"} {
		if err := os.WriteFile(devConf(4, loopIn, setting), []byte(value), 0); err != nil {
			return nil, err
		}
	}
	if in.Attrs().Flags&out.Attrs().Flags&net.FlagUp != 0 {
		return in, nil // which is done last
	}
	address := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(127, 112, 108, 1).To4(), Mask: net.CIDRMask(32, 32)}, Scope: int(netlink.SCOPE_HOST)}
	if err := netlink.AddrReplace(in, address); err != nil {
		return nil, fmt.Errorf("address of %s: %w", loopIn, err)
	}
	for _, end := range []netlink.Link{in, out} {
		const none = 1 // IN6_ADDR_GEN_MODE_NONE
		if err := netlink.LinkSetIP6AddrGenMode(end, none); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return nil, fmt.Errorf("%s without addresses of IPv6: %w", end.Attrs().Name, err)
		}
		if err := errors.Join(netlink.LinkSetARPOff(end), netlink.LinkSetUp(end)); err != nil {
			return nil, fmt.Errorf("set %s up: %w", end.Attrs().Name, err)
		}
	}
	return in, nil
}

// devConf is the file of a device's setting.
func devConf(version int, device, setting string) string {
	return fmt.Sprintf("/proc/sys/net/ipv%d/conf/%s/%s", version, device, setting)
}

// RemoveLoop removes what KeepLoop installed in the network namespace of a file, or of the process if there is none. Connections by the loop
// live on while KeepNAT's rules are there. What is not there is none to remove.
func RemoveLoop(netNS string) error {
	// First what sends packets there.
	err := unchainLoop(netNS)
	return errors.Join(err, InNetNS(netNS, func() error {
		var errs []error
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			if err := netlink.RuleDel(loopRuleOf(family)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
				errs = append(errs, fmt.Errorf("remove the rule for routes by %s: %w", loopOut, err))
			}
		}
		in, err := netlink.LinkByName(loopIn)
		if _, none := err.(netlink.LinkNotFoundError); none {
			return errors.Join(errs...)
		}
		if err == nil && in.Type() == "veth" {
			err = netlink.LinkDel(in)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove %s: %w", loopIn, err))
		}
		return errors.Join(errs...)
	}))
}

// ReleaseLoop removes the loop that a former Balancer with the same PinDir left in a network namespace. Without a PinDir there is none.
func (b *Balancer) ReleaseLoop(netNS string) error {
	if b.options.PinDir == "" {
		return nil
	}
	index := 0
	err := InNetNS(netNS, func() error {
		in, err := netlink.LinkByName(loopIn)
		if _, none := err.(netlink.LinkNotFoundError); none {
			return nil
		} else if err != nil {
			return err
		}
		index = in.Attrs().Index
		return nil
	})
	if err != nil {
		return fmt.Errorf("look for %s: %w", loopIn, err)
	}
	if _, err := os.Stat(b.devicePin(index)); errors.Is(err, os.ErrNotExist) {
		return nil // there is none, or it is another one's
	} else if err != nil {
		return fmt.Errorf("look for pinned links: %w", err)
	}
	err = RemoveLoop(netNS)
	if gone := os.Remove(b.egressPin()); !errors.Is(gone, os.ErrNotExist) {
		err = errors.Join(err, gone)
	}
	return err
}

// loopSet has the frontends that are known one by one: address, protocol and port, each in words of four bytes.
func loopSet(keyWords int) *nftables.Set {
	name, address := "loop4", nftables.TypeIPAddr
	if keyWords == keyWords6 {
		name, address = "loop6", nftables.TypeIP6Addr
	}
	return &nftables.Set{
		Table: natTable(), Name: name, Concatenation: true,
		KeyType: nftables.MustConcatSetType(address, nftables.TypeInetProto, nftables.TypeInetService),
	}
}

func loopElement(f Frontend) nftables.SetElement {
	k := append(f.Address.Addr().AsSlice(), byte(f.Protocol), 0, 0, 0)
	return nftables.SetElement{Key: append(binary.BigEndian.AppendUint16(k, f.Address.Port()), 0, 0)}
}

// loopElements gives change the elements of frontends, not too many at a time: the size of a message is limited.
func loopElements(frontends []Frontend, change func(*nftables.Set, []nftables.SetElement) error) error {
	const most = 500
	of := make(map[int][]nftables.SetElement)
	for _, f := range frontends {
		words := keyWords4
		if f.Address.Addr().Is6() {
			words = keyWords6
		}
		of[words] = append(of[words], loopElement(f))
	}
	for words, elements := range of {
		for some := range slices.Chunk(elements, most) {
			if err := change(loopSet(words), some); err != nil {
				return err
			}
		}
	}
	return nil
}

// Chains of the loop.
const (
	loopDeparture = "loop-departure"
	loopArrival   = "loop-arrival"
)

// chainLoop has natTable's rules send packets to the loop.
func (b *Balancer) chainLoop() error {
	prefixes, err := prefixesOf(b.clusterIPs)
	if err != nil {
		return err
	}
	frontends := make(map[Frontend]bool)
	for _, f := range b.families() {
		if f.table.used == 0 {
			continue
		}
		for k := range f.table.all() {
			if frontend := k.frontend(); frontend.Scope == Outside {
				frontends[frontend] = true
			}
		}
	}
	err = b.changeNAT(func(nft *nftables.Conn) error {
		table := nft.AddTable(natTable())
		for _, words := range []int{keyWords4, keyWords6} {
			if err := nft.AddSet(loopSet(words), nil); err != nil {
				return err
			}
			nft.FlushSet(loopSet(words))
		}
		if err := loopElements(slices.Collect(maps.Keys(frontends)), nft.SetAddElements); err != nil {
			return err
		}
		addDeparture(nft, prefixes)
		raw := *nftables.ChainPriorityRaw
		arrival := nft.AddChain(&nftables.Chain{Table: table, Name: loopArrival, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: &raw})
		nft.FlushChain(arrival)
		// Else the mark would lead there again, round and round. What the program translates, it leaves this one; what it marks is none.
		nft.AddRule(&nftables.Rule{Table: table, Chain: arrival, Exprs: append(isMarked(0xffffffff, loopMark), setMark(0)...)})
		return nil
	})
	if err == nil {
		b.loop.chained, b.loop.frontends = true, frontends
	}
	return err
}

// addDeparture replaces the rules by which packets are sent to the loop.
//
// Subtle: before conntrack, which must not know them yet. It would take those that come out of the loop for the same connection, that has
// no NAT.
func addDeparture(nft *nftables.Conn, prefixes []netip.Prefix) {
	raw := *nftables.ChainPriorityRaw
	chain := nft.AddChain(&nftables.Chain{Table: natTable(), Name: loopDeparture, Type: nftables.ChainTypeRoute, Hooknum: nftables.ChainHookOutput, Priority: &raw})
	nft.FlushChain(chain)
	add := func(rules ...[]expr.Any) {
		nft.AddRule(&nftables.Rule{Table: natTable(), Chain: chain, Exprs: slices.Concat(rules...)})
	}
	depart := append(setMark(loopMark), &expr.Notrack{})
	for _, words := range []int{keyWords4, keyWords6} {
		version, length, after := isVersion(unix.NFPROTO_IPV4), uint32(4), uint32(registerAfterIPv4)
		offset := uint32(16)
		if words == keyWords6 {
			version, length, after, offset = isVersion(unix.NFPROTO_IPV6), 16, registerAfterIPv6, 24
		}
		add(version, []expr.Any{
			&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: after},
			&expr.Payload{DestRegister: after + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Lookup{SourceRegister: register, SetName: loopSet(words).Name},
		}, depart)
	}
	// Whoever has a ClusterIP for an address of the node is there for its processes, as a cache of names is.
	add(isDevice(expr.MetaKeyOIFNAME, "lo"), []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}})
	for _, p := range prefixes {
		add(isTo(p), depart)
	}
}

func setMark(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: register, Data: word32(mark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: register},
	}
}

func isVersion(family byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{family}},
	}
}

// isTo matches packets to a prefix.
func isTo(p netip.Prefix) []expr.Any {
	version, offset := isVersion(unix.NFPROTO_IPV4), uint32(16)
	if p.Addr().Is6() {
		version, offset = isVersion(unix.NFPROTO_IPV6), 24
	}
	address := p.Masked().Addr().AsSlice()
	length := uint32(len(address))
	return append(version,
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: length, Mask: net.CIDRMask(p.Bits(), len(address)*8), Xor: make([]byte, length)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: address})
}

// unchainLoop removes the chains of the loop, where they are.
func unchainLoop(netNS string) error {
	return changeNAT(netNS, func(nft *nftables.Conn) error {
		chains, err := nft.ListChainsOfTableFamily(nftables.TableFamilyINet)
		if err != nil {
			return err
		}
		for _, c := range chains {
			if c.Table.Name == natName && (c.Name == loopDeparture || c.Name == loopArrival) {
				nft.DelChain(c)
			}
		}
		return nil
	})
}

// chainClusterIPs has the rules know the prefixes of SetClusterIPs, if there is a loop.
func (b *Balancer) chainClusterIPs(prefixes []netip.Prefix) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.loop.chained {
		return nil
	}
	return b.changeNAT(func(nft *nftables.Conn) error {
		addDeparture(nft, prefixes)
		return nil
	})
}

// chainFrontends has the rules know which frontends there are after changes, if there is a loop.
func (b *Balancer) chainFrontends(changes []Change) (errs []error) {
	if !b.loop.chained {
		return nil
	}
	var come, gone []Frontend
	for _, c := range changes {
		f := c.Frontend
		if f.Scope != Outside {
			continue
		}
		f.Address = netip.AddrPortFrom(f.Address.Addr().Unmap(), f.Address.Port())
		switch is := b.familyOf(f).table.find(keyOf(f)) != nil; {
		case is && !b.loop.frontends[f]:
			come = append(come, f)
		case !is && b.loop.frontends[f]:
			gone = append(gone, f)
		}
	}
	if len(come)+len(gone) == 0 {
		return nil
	}
	err := b.changeNAT(func(nft *nftables.Conn) error {
		return errors.Join(loopElements(gone, nft.SetDeleteElements), loopElements(come, nft.SetAddElements))
	})
	if errors.Is(err, unix.ENOENT) {
		b.loop.chained = false // somebody flushed all rules: KeepLoop brings them back
		return nil
	}
	if err != nil {
		for _, f := range slices.Concat(come, gone) {
			errs = append(errs, &FrontendError{f, err})
		}
		return errs
	}
	for _, f := range come {
		b.loop.frontends[f] = true
	}
	for _, f := range gone {
		delete(b.loop.frontends, f)
	}
	return nil
}
