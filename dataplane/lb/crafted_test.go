// SPDX-License-Identifier: Apache-2.0

package lb_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// What becomes of a frame, if it gets no entry of conntrack.
	untouched, refused, dropped = "untouched", "refused", "dropped"
	// What a program at a device answers (Linux 6.6, include/uapi/linux/bpf.h).
	tcxNext, tcxDrop = 0xffffffff, 2
	// Where an skb has its mark and ifindex (the same file).
	skbMark, skbDevice = 2, 10
	// anyMark is on all frames that come, and stays on those that are not refused.
	anyMark = 0x1000
	// loopback is the index of that device in every network namespace. Its address in Ethernet is zero, and so are those of frames.
	loopback = 1
	// ipAt is where a frame of Ethernet has its packet of IP.
	ipAt = 14
)

// An skb is struct __sk_buff, with room for what newer kernels add.
type skb [64]uint32

// firstFateOf is fateOf where no connection was before.
func firstFateOf(program *ebpf.Program, frame []byte) (string, error) {
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		return "", err
	}
	return fateOf(program, frame)
}

// fateOf runs a program on a frame, and tells what became of it: one of the fates above, or the entries of conntrack that are there
// then. It runs on a thread in the node's network namespace.
func fateOf(program *ebpf.Program, frame []byte) (string, error) {
	var after skb
	before, out := skb{skbMark: anyMark, skbDevice: loopback}, make([]byte, len(frame)+64)
	options := ebpf.RunOptions{Data: frame, DataOut: out, Context: before, ContextOut: &after}
	verdict, err := program.Run(&options)
	if err != nil {
		return "", err
	}
	if !bytes.Equal(options.DataOut, frame) {
		return "", fmt.Errorf("the program changed the frame from\n%x to\n%x", frame, options.DataOut)
	}
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_UNSPEC)
	if err != nil {
		return "", err
	}
	var entries []string
	for _, f := range flows {
		entries = append(entries, entry(f.Forward.Protocol, tuple(f.Forward), tuple(f.Reverse)))
	}
	fates := map[[2]uint32]string{{tcxNext, anyMark}: untouched, {tcxNext, lb.RefuseMark}: refused, {tcxDrop, anyMark}: dropped, {tcxNext, lb.DiscardMark}: dropped}
	fate := fates[[2]uint32{verdict, after[skbMark]}]
	switch {
	case fate == untouched && len(entries) > 0:
		return strings.Join(entries, ", "), nil
	case fate == "" || len(entries) > 0:
		return "", fmt.Errorf("verdict %#x, mark %#x, entries %v", verdict, after[skbMark], entries)
	}
	return fate, nil
}

// An ends is who sends, and to whom.
type ends struct{ from, to netip.AddrPort }

func (e ends) String() string { return fmt.Sprint(e.from, ">", e.to) }

func between(from, to string) ends {
	return ends{netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)}
}

func tuple(t netlink.IPTuple) ends {
	return between(net.JoinHostPort(t.SrcIP.String(), fmt.Sprint(t.SrcPort)), net.JoinHostPort(t.DstIP.String(), fmt.Sprint(t.DstPort)))
}

// entry is the fate of what got an entry of conntrack, which says where answers come from and go to.
func entry(protocol byte, asked, answers ends) string {
	return fmt.Sprintf("entry of protocol %d %v, answers %v", protocol, asked, answers)
}

// Flags of TCP.
const fin, syn, rst, psh, ack, ecn = 0x01, 0x02, 0x04, 0x08, 0x10, 0xc0

func (e ends) ports() []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, e.from.Port()), e.to.Port())
}

func (e ends) segment(flags byte) []byte {
	return e.sealed(unix.IPPROTO_TCP, append(e.ports(), 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, flags, 0x10, 0, 0, 0, 0, 0), 16)
}

func (e ends) datagram(payload ...byte) []byte {
	return e.sealed(unix.IPPROTO_UDP, slices.Concat(e.ports(), []byte{0, byte(8 + len(payload)), 0, 0}, payload), 6)
}

// sealed is what IP carries with its checksum, which but for ICMP counts addresses, too (RFC 9293, 3.1, RFC 8200, 8.1, of the same sum).
func (e ends) sealed(protocol byte, carried []byte, at int) []byte {
	var pseudo []byte
	if protocol != unix.IPPROTO_ICMP {
		pseudo = slices.Concat(e.from.Addr().AsSlice(), e.to.Addr().AsSlice(), []byte{0, protocol, 0, byte(len(carried))})
	}
	binary.BigEndian.PutUint16(carried[at:], checksum(append(pseudo, carried...)))
	return carried
}

func checksum(of []byte) uint16 {
	sum := uint32(0)
	for i, b := range of {
		sum += uint32(b) << (8 * (1 - i%2))
	}
	return ^uint16(sum>>16 + sum&0xffff)
}

// frame puts what IP carries into a frame of Ethernet.
func (e ends) frame(protocol byte, parts ...[]byte) []byte {
	carried := slices.Concat(parts...)
	from, to := e.from.Addr().AsSlice(), e.to.Addr().AsSlice()
	addresses := make([]byte, 12) // of Ethernet
	if e.to.Addr().Is6() {
		return slices.Concat(addresses, []byte{0x86, 0xdd, 6 << 4, 0, 0, 0, 0, byte(len(carried)), protocol, 64}, from, to, carried)
	}
	f := slices.Concat(addresses, []byte{0x08, 0x00, 4<<4 | 5, 0, 0, byte(20 + len(carried)), 0, 1, 0, 0, 64, protocol, 0, 0}, from, to)
	binary.BigEndian.PutUint16(f[ipAt+10:], checksum(f[ipAt:]))
	return append(f, carried...)
}

// with is a frame with other bytes in a place. The checksum stays: no program reads it.
func with(frame []byte, at int, other ...byte) []byte {
	return slices.Replace(slices.Clone(frame), at, at+len(other), other...)
}

// extended is a frame of IPv6 whose packet has extension headers of these kinds, each of eight bytes.
func (e ends) extended(protocol byte, carried []byte, kinds ...byte) []byte {
	for _, kind := range slices.Backward(kinds) {
		// As a fragment header it says that this is the whole.
		carried = append([]byte{protocol, 0, 0, 0, 0, 0, 0, 0}, carried...)
		protocol = kind
	}
	return e.frame(protocol, carried)
}

// A crafted frame has a fate.
type crafted struct {
	name  string
	frame []byte
	fate  string
	pods  string // its fate if only pods are behind the device; empty means the same
}

// A craft makes frames for a territory.
type craft struct {
	territory
	service, port, refused, unallocated, nobody ends // from the client
	icmp, echo, reply                           byte // protocol and types
	tcp, udp                                    string
}

// mustCraft gives a Balancer the Services of a territory: of one a backend is known, one has none, and refuses TCP and drops UDP.
func mustCraft(tb testing.TB, b *lb.Balancer, at territory) craft {
	tb.Helper()
	client := net.JoinHostPort(at.client, "4000")
	c := craft{
		territory: at, service: between(client, at.vip), port: between(client, at.otherPort), refused: between(client, at.otherVIP),
		unallocated: between(client, at.unallocated), nobody: between(client, net.JoinHostPort(at.outsider, "80")),
		icmp: unix.IPPROTO_ICMP, echo: 8,
	}
	if c.service.to.Addr().Is6() {
		c.icmp, c.echo, c.reply = unix.IPPROTO_ICMPV6, 128, 129
	}
	first, _ := at.backends()
	c.tcp = entry(unix.IPPROTO_TCP, c.service, between(first, client))
	c.udp = entry(unix.IPPROTO_UDP, c.service, between(first, client))
	silent := to(udp(c.otherVIP))
	silent.Drop = true
	mustSync(tb, b, to(tcp(c.vip), first), to(udp(c.vip), first), to(rest(c.vip)), to(tcp(c.otherVIP)), silent, to(rest(c.otherVIP)))
	return c
}

func (c craft) synTo(e ends) []byte  { return e.frame(unix.IPPROTO_TCP, e.segment(syn)) }
func (c craft) udpTo(e ends) []byte  { return e.frame(unix.IPPROTO_UDP, e.datagram('?')) }
func (c craft) echoTo(e ends) []byte { return c.message(e, c.icmp, c.echo, 0, '?') }

// farTo is UDP behind options, and for IPv6 a fragment header.
func (c craft) farTo(e ends) []byte {
	if e.to.Addr().Is4() {
		return with(e.frame(unix.IPPROTO_UDP, make([]byte, 8), e.datagram('?')), ipAt, 0x47)
	}
	return e.extended(unix.IPPROTO_UDP, e.datagram('?'), unix.IPPROTO_DSTOPTS, unix.IPPROTO_FRAGMENT)
}

func (c craft) message(e ends, protocol, kind, code byte, payload ...byte) []byte {
	return e.frame(protocol, e.sealed(protocol, append([]byte{kind, code, 0, 0, 0, 1, 0, 1}, payload...), 2))
}

// frames are those of both IP versions.
func (c craft) frames() []crafted {
	s, synFrame, udpFrame := c.service, c.synTo(c.service), c.udpTo(c.service)
	tcpAt, udpAt := len(synFrame)-20, len(udpFrame)-9
	first, _ := c.backends()
	outside := between(net.JoinHostPort(c.outsider, "4000"), c.vip)
	masqueraded := entry(unix.IPPROTO_TCP, outside, between(first, net.JoinHostPort(c.node, "4000")))
	otherVersion, errorsOfICMP := []byte{0x86, 0xdd}, [][2]byte{{3, 1}, {3, 4}, {5, 1}, {11, 0}} // unreachable, too big, redirect, too old
	if s.to.Addr().Is6() {
		otherVersion, errorsOfICMP = []byte{0x08, 0x00}, [][2]byte{{1, 4}, {2, 0}, {3, 0}, {4, 0}} // unreachable, too big, too old, unknown
	}
	frames := []crafted{
		{name: "SYN that asks for ECN", frame: s.frame(unix.IPPROTO_TCP, s.segment(syn|ecn)), fate: c.tcp},
		{name: "SYN with payload", frame: s.frame(unix.IPPROTO_TCP, s.segment(syn|psh), []byte("early")), fate: c.tcp},
		{"from outside", c.synTo(outside), masqueraded, entry(unix.IPPROTO_TCP, outside, between(first, outside.from.String()))},
		{name: "echo reply", frame: c.message(s, c.icmp, c.reply, 0), fate: untouched},

		// IP and conntrack judge what is wrong. The entry is one that a right packet would have got, too, and ends unused.
		{name: "wrong checksum of TCP", frame: with(synFrame, tcpAt+16, 0xba, 0xad), fate: c.tcp},
		{name: "wrong length of TCP's header", frame: with(synFrame, tcpAt+12, 1<<4), fate: c.tcp},
		{name: "wrong checksum of UDP", frame: with(udpFrame, udpAt+6, 0xba, 0xad), fate: c.udp},
		{name: "wrong length of UDP", frame: with(udpFrame, udpAt+4, 0xff, 0xff), fate: c.udp},

		{name: "to another host of the Ethernet", frame: with(synFrame, 0, 2), fate: untouched},
		{name: "ARP", frame: with(synFrame, 12, 0x08, 0x06), fate: untouched},
		{name: "length of IEEE 802.3", frame: with(synFrame, 12, 0, 46), fate: untouched},
		// Note: from a device the kernel takes the tag before the program sees the packet (__netif_receive_skb_core), but not here.
		{name: "VLAN", frame: slices.Insert(slices.Clone(synFrame), 12, 0x81, 0x00, 0, 5), fate: untouched},
		{name: "Ethernet says the other version of IP", frame: with(synFrame, 12, otherVersion...), fate: untouched},
		{name: "IP says its other version", frame: with(synFrame, ipAt, synFrame[ipAt]^0x20), fate: untouched},
	}
	for to, fates := range map[ends][3]string{
		s: {c.tcp, c.udp, refused}, c.port: {refused, refused, refused}, c.refused: {refused, dropped, refused},
		c.unallocated: {dropped, dropped, dropped}, c.nobody: {untouched, untouched, untouched},
	} {
		for i, frame := range [][]byte{c.synTo(to), c.udpTo(to), c.echoTo(to)} {
			name := []string{"SYN", "UDP", "echo request"}[i]
			frames = append(frames, crafted{name: fmt.Sprint(name, " to ", to.to), frame: frame, fate: fates[i]})
		}
	}
	for name, flags := range map[string]byte{
		"SYN+ACK": syn | ack, "RST": rst, "RST+ACK": rst | ack, "FIN": fin, "FIN+ACK": fin | ack, "ACK": ack, "SYN+FIN": syn | fin, "SYN+RST": syn | rst, "none": 0, "all": 0xff,
	} {
		for _, to := range []ends{s, c.port, c.refused, c.unallocated, c.nobody} {
			frames = append(frames, crafted{name: fmt.Sprint(name, " to ", to.to), frame: to.frame(unix.IPPROTO_TCP, to.segment(flags)), fate: untouched})
		}
	}
	about := ends{s.to, s.from} // what an error of ICMP is about: a packet from the Service
	for _, of := range errorsOfICMP {
		frames = append(frames, crafted{name: fmt.Sprint("ICMP of type and code ", of), frame: c.message(s, c.icmp, of[0], of[1], c.synTo(about)[ipAt:]...), fate: untouched})
	}
	for _, protocol := range []byte{unix.IPPROTO_GRE, unix.IPPROTO_ESP, unix.IPPROTO_AH, unix.IPPROTO_SCTP, unix.IPPROTO_IPIP, 0xff} {
		frames = append(frames, crafted{name: fmt.Sprint("protocol ", protocol), frame: s.frame(protocol, s.segment(syn)), fate: untouched})
	}
	if s.to.Addr().Is6() {
		return append(frames, c.frames6()...)
	}
	return append(frames, c.frames4()...)
}

func (c craft) frames4() []crafted {
	s, synFrame, udpFrame := c.service, c.synTo(c.service), c.udpTo(c.service)
	options := func(words int) []byte { return bytes.Repeat([]byte{1}, 4*words) } // of no operation
	return []crafted{
		{name: "an option", frame: with(s.frame(unix.IPPROTO_TCP, options(1), s.segment(syn)), ipAt, 0x46), fate: c.tcp},
		{name: "as many options as can be", frame: with(s.frame(unix.IPPROTO_UDP, options(10), s.datagram()), ipAt, 0x4f), fate: c.udp},
		{name: "options that are not there", frame: with(synFrame, ipAt, 0x4f), fate: untouched},
		{name: "a header that is too short", frame: with(synFrame, ipAt, 0x44), fate: untouched},
		{name: "a header without length", frame: with(synFrame, ipAt, 0x40), fate: untouched},
		{name: "wrong checksum of IP", frame: with(synFrame, ipAt+10, 0xba, 0xad), fate: c.tcp},
		{name: "not to be fragmented", frame: with(synFrame, ipAt+6, 0x40, 0), fate: c.tcp},
		{name: "first fragment of TCP", frame: with(synFrame, ipAt+6, 0x20, 0), fate: c.tcp},
		{name: "first fragment of UDP", frame: with(udpFrame, ipAt+6, 0x20, 0), fate: c.udp},
		{name: "fragment of TCP", frame: with(synFrame, ipAt+6, 0x20, 1), fate: untouched},
		{name: "fragment of UDP", frame: with(udpFrame, ipAt+6, 0x3f, 0xff), fate: untouched},
		{name: "last fragment", frame: with(udpFrame, ipAt+6, 0x01, 0), fate: untouched},
		{name: "last fragment to no Service", frame: with(c.udpTo(c.unallocated), ipAt+6, 0x01, 0), fate: untouched},
		{name: "padding of Ethernet that looks like TCP", frame: with(synFrame, ipAt+2, 0, 20), fate: untouched},
		{name: "echo request of ICMPv6", frame: c.message(s, unix.IPPROTO_ICMPV6, 128, 0), fate: untouched},
		{name: "echo request of ICMP in ICMPv6", frame: c.message(s, unix.IPPROTO_ICMPV6, 8, 0), fate: untouched},
	}
}

func (c craft) frames6() []crafted {
	const hop, routing, options, fragment = unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS, unix.IPPROTO_FRAGMENT
	s := c.service
	part := func(to ends, offset ...byte) []byte {
		return with(to.extended(unix.IPPROTO_UDP, to.datagram('?'), fragment), ipAt+40+2, offset...)
	}
	long := append([]byte{unix.IPPROTO_TCP, 3}, make([]byte, 30)...)
	frames := []crafted{
		{name: "options of 32 bytes", frame: s.frame(options, long, s.segment(syn)), fate: c.tcp},
		{name: "options that are not there", frame: s.frame(options, with(long, 1, 0xff), s.segment(syn)), fate: untouched},
		{name: "a header that is not looked through", frame: s.extended(unix.IPPROTO_TCP, s.segment(syn), unix.IPPROTO_AH), fate: untouched},
		{name: "nothing follows", frame: s.extended(unix.IPPROTO_NONE, s.segment(syn), options), fate: untouched},
		{name: "all fragments in one", frame: part(s, 0, 0), fate: c.udp},
		{name: "first fragment", frame: part(s, 0, 1), fate: c.udp},
		{name: "fragment", frame: part(s, 0, 8|1), fate: untouched},
		{name: "fragment at half of all", frame: part(s, 0x80, 1), fate: untouched},
		{name: "last fragment", frame: part(s, 0x05, 0xa8), fate: untouched},
		{name: "last fragment to no Service", frame: part(c.unallocated, 0x05, 0xa8), fate: untouched},
		{name: "padding of Ethernet that looks like TCP", frame: with(c.synTo(s), ipAt+4, 0, 0), fate: untouched},
		{name: "echo request behind options", frame: s.extended(c.icmp, c.echoTo(s)[ipAt+40:], hop), fate: refused},
		{name: "echo request of ICMP", frame: c.message(s, unix.IPPROTO_ICMP, 8, 0), fate: untouched},
		{name: "echo request of ICMPv6 in ICMP", frame: c.message(s, unix.IPPROTO_ICMP, 128, 0), fate: untouched},
	}
	// Each adds a kind that is looked through, and the last is one header too many (EXTENSIONS).
	kinds := []byte{hop, options, routing, fragment, options, options, options}
	for n := range len(kinds) + 1 {
		want := map[bool]string{true: c.udp, false: untouched}[n < len(kinds)]
		frames = append(frames, crafted{name: fmt.Sprint(n, " extension headers"), frame: s.extended(unix.IPPROTO_UDP, s.datagram(), kinds[:n]...), fate: want})
	}
	return frames
}

func TestCrafted(t *testing.T) {
	onPackets(t, func(t *testing.T, l landscape) {
		frames := mustCraft(t, l.Balancer, l.at).frames()
		for name, program := range l.PacketPrograms() {
			for _, f := range frames {
				want := f.fate
				if name == "ingress_pods" && f.pods != "" {
					want = f.pods
				}
				t.Run(name+"/"+f.name, func(t *testing.T) {
					l.node.Enter(t, func() error {
						first, err := firstFateOf(program, f.frame)
						again, errAgain := fateOf(program, f.frame)
						if first != want || again != want {
							t.Errorf("%x: want %s, got %s, and again %s", f.frame, want, first, again)
						}
						return errors.Join(err, errAgain)
					})
				})
			}
		}
	})
}

func TestCraftedShort(t *testing.T) {
	onPackets(t, func(t *testing.T, l landscape) {
		c := mustCraft(t, l.Balancer, l.at)
		for _, test := range []struct {
			name   string
			to     func(ends) []byte
			unread int // bytes at the end that a fate does not depend on
			fate   string
		}{
			{"TCP", c.synTo, 6, c.tcp},
			{"UDP", c.udpTo, 5, c.udp},
			{"UDP behind more headers", c.farTo, 5, c.udp},
			{"echo request", c.echoTo, 8, refused},
		} {
			for to, fate := range map[ends]string{c.service: test.fate, c.unallocated: dropped, c.nobody: untouched} {
				t.Run(fmt.Sprint(test.name, " to ", to.to), func(t *testing.T) {
					l.node.Enter(t, func() error {
						frame, want := test.to(to), untouched
						for n := range len(frame) + 1 {
							if n == len(frame)-test.unread {
								want = fate
							}
							got, err := firstFateOf(l.PacketPrograms()["ingress"], frame[:n])
							if err != nil && !isTooShort(err, frame[:n]) {
								return fmt.Errorf("%d bytes: %w", n, err)
							}
							if err == nil && got != want {
								t.Errorf("%d bytes of %x: want %s, got %s", n, frame, want, got)
							}
						}
						return nil
					})
				})
			}
		}
	})
}

// isTooShort tells whether an error says that the kernel runs no program on a frame, as its header of Ethernet is not whole, or as for
// Linux 6.18 nothing follows or that of IP is not whole (net/bpf/test_run.c).
func isTooShort(err error, frame []byte) bool {
	return errors.Is(err, unix.EINVAL) && (len(frame) <= ipAt || !destination(frame).IsValid())
}

// destination is the address that a frame's packet of IP is to, or none. One of IPv4 that is mapped into IPv6 counts as itself.
func destination(frame []byte) netip.Addr {
	packet := frame[ipAt:]
	switch kind := binary.BigEndian.Uint16(frame[12:]); {
	case kind == unix.ETH_P_IP && len(packet) >= 20 && packet[0]>>4 == 4 && packet[0]&0x0f >= 5:
		return netip.AddrFrom4([4]byte(packet[16:]))
	case kind == unix.ETH_P_IPV6 && len(packet) >= 40 && packet[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(packet[24:])).Unmap()
	}
	return netip.Addr{}
}

func FuzzPacket(f *testing.F) {
	var nodes, firsts []string
	var clusterIPs []netip.Prefix
	for _, at := range territories {
		nodes, firsts, clusterIPs = append(nodes, at.node), append(firsts, at.first), append(clusterIPs, netip.MustParsePrefix(at.clusterIPs))
	}
	node := lbtest.StartNode(f, nodes...)
	node.AddPod(f, "first", firsts...)
	b := mustLoadPackets(f, node, lb.PacketOptions{KnowsInsiders: true})
	if err := b.SetClusterIPs(clusterIPs); err != nil {
		f.Fatal(err)
	}
	var services []netip.Addr
	for _, at := range territories {
		c := mustCraft(f, b, at)
		services = append(services, c.service.to.Addr(), c.refused.to.Addr())
		for _, crafted := range c.frames() {
			f.Add(crafted.frame, false)
		}
	}
	f.Fuzz(func(t *testing.T, frame []byte, pods bool) {
		if len(frame) > 2000 {
			return // longer ones have no room in the kernel's page
		}
		program := b.PacketPrograms()[map[bool]string{false: "ingress", true: "ingress_pods"}[pods]]
		node.Enter(t, func() error {
			fate, err := firstFateOf(program, frame)
			if isTooShort(err, frame) {
				return nil
			}
			if err != nil || fate == untouched {
				return err
			}
			to := destination(frame)
			isCluster := slices.ContainsFunc(clusterIPs, func(p netip.Prefix) bool { return p.Contains(to) })
			if fate == dropped && !isCluster || fate != dropped && !slices.Contains(services, to) {
				t.Errorf("%s though it is to %v: %x", fate, to, frame)
			}
			return nil
		})
	})
}
