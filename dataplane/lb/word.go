// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Protocol is an IP protocol number.
type Protocol uint8

// The protocols that are carried.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132 // packets only
)

// A Scope says to whom a Frontend is what it is.
type Scope uint8

const (
	// Inside is for clients inside the cluster, and for those outside where there is no frontend for them.
	Inside Scope = iota
	// Outside is for packets of clients outside the cluster.
	Outside
	// Rest is what is at an address besides its ports: such a frontend has neither port nor protocol, and no backends. It refuses,
	// where other addresses of the cluster's Services drop packets.
	Rest
)

func (p Protocol) String() string {
	switch p {
	case 0:
		return "any"
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case SCTP:
		return "sctp"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

func (s Scope) String() string {
	switch s {
	case Inside:
		return "inside"
	case Outside:
		return "outside"
	case Rest:
		return "rest"
	}
	return fmt.Sprintf("scope %d", uint8(s))
}

// A Frontend is what clients connect to.
type Frontend struct {
	Address  netip.AddrPort // IPv4, also mapped into IPv6, or IPv6 without a zone
	Protocol Protocol
	Scope    Scope
}

func (f Frontend) String() string {
	switch f.Scope {
	case Outside:
		return fmt.Sprintf("%v/%v from outside", f.Address, f.Protocol)
	case Rest:
		return fmt.Sprintf("%v/other ports", f.Address.Addr())
	}
	return fmt.Sprintf("%v/%v", f.Address, f.Protocol)
}

func (f Frontend) check() error {
	switch {
	case f.Scope > Rest:
		return fmt.Errorf("scope %d does not exist", uint8(f.Scope))
	case f.Scope != Rest && f.Protocol != TCP && f.Protocol != UDP && f.Protocol != SCTP:
		return errors.New("want TCP, UDP or SCTP")
	case f.Scope != Rest:
		return checkAddress("frontend", f.Address)
	}
	if !IsHost(f.Address.Addr()) || f.Address.Port() != 0 || f.Protocol != 0 {
		return errors.New("want the address of a host, and neither port nor protocol")
	}
	return nil
}

// Words of a key: all are one, or for IPv6 three.
const (
	keyWords4 = 1
	keyWords6 = 3
)

// A key is a Frontend as its entry has it: {address:32, port:16, protocol:8, scope:8} in network byte order, for IPv6 with
// no address there, but in the two words after. See struct frontend in services.h. The unused words of IPv4 are zero.
type key [keyWords6]uint64

// keyOf expects a Frontend that check passed.
func keyOf(f Frontend) (k key) {
	var first [8]byte
	address := f.Address.Addr().Unmap()
	if address.Is4() {
		four := address.As4()
		copy(first[:], four[:])
	} else {
		sixteen := address.As16()
		k[1], k[2] = binary.NativeEndian.Uint64(sixteen[:8]), binary.NativeEndian.Uint64(sixteen[8:])
	}
	binary.BigEndian.PutUint16(first[4:], f.Address.Port())
	first[6], first[7] = byte(f.Protocol), byte(f.Scope)
	k[0] = binary.NativeEndian.Uint64(first[:])
	return k
}

func (k key) frontend() Frontend {
	var first [8]byte
	binary.NativeEndian.PutUint64(first[:], k[0])
	address := netip.AddrFrom4([4]byte(first[:4]))
	if k[1]|k[2] != 0 {
		var sixteen [16]byte
		binary.NativeEndian.PutUint64(sixteen[:8], k[1])
		binary.NativeEndian.PutUint64(sixteen[8:], k[2])
		address = netip.AddrFrom16(sixteen)
	}
	return Frontend{
		Address:  netip.AddrPortFrom(address, binary.BigEndian.Uint16(first[4:])),
		Protocol: Protocol(first[6]),
		Scope:    Scope(first[7]),
	}
}

// A word says where a frontend's backends are: {base:32, count:16, owner:16}. They are those from base on, of its entry if
// base is one there, else of the backends map, whose first slots are not used. The top bits of base are flags.
type word uint64

// The flags. See services.h.
const (
	affine     word = 1 << 63 // clients keep their backend
	drop       word = 1 << 62 // without backends packets are dropped, not refused
	ranged     word = 1 << 61 // only clients of some addresses are admitted
	masquerade word = 1 << 60 // the backend shall see an address of the node
	flags      word = 0x1f << 59
)

// maxCount is how many backends one frontend can have.
const maxCount = 1<<16 - 1

func makeWord(base, count int, owner uint64) word {
	return word(uint64(base)<<32 | uint64(count)<<16 | owner)
}

func (w word) base() int     { return int(w &^ flags >> 32) }
func (w word) count() int    { return int(w >> 16 & maxCount) }
func (w word) owner() uint64 { return uint64(w & 0xffff) }

// inline tells whether the backends, if any, are in the entry.
func (w word) inline() bool { return w.base() < entryWords }

// region is the part of the backends map that a word claims which is not inline.
func (w word) region() region { return regionFor(w.base(), w.count()) }

// unused is the part of the backends map that no word can lead to.
var unused = regionFor(0, entryWords)

// Words of a backend: those of its slot in the backends map.
const (
	slotWords4 = 1
	slotWords6 = 4
)

// A slot is a backend as the maps have it: {address:32, port:16, owner:16}, for IPv6 with no address there, but in the two
// words after, and then the hash of the three.
type slot [slotWords6]uint64

func (t *table) slotOf(backend netip.AddrPort, owner uint64) (s slot) {
	words := backendKeyOf(backend)
	copy(s[:], words[:])
	s[0] |= owner
	if backend.Addr().Unmap().Is6() {
		s[3] = t.hash(key(s[:keyWords6]))
	}
	return s
}

// backendKeyOf is a backend as a slot has it, without an owner and a hash.
func backendKeyOf(backend netip.AddrPort) (k key) {
	var port [2]byte
	binary.BigEndian.PutUint16(port[:], backend.Port())
	k[0] = uint64(binary.NativeEndian.Uint16(port[:])) << 16
	address := backend.Addr().Unmap()
	if address.Is4() {
		four := address.As4()
		k[0] |= uint64(binary.NativeEndian.Uint32(four[:])) << 32
		return k
	}
	sixteen := address.As16()
	k[1], k[2] = binary.NativeEndian.Uint64(sixteen[:8]), binary.NativeEndian.Uint64(sixteen[8:])
	return k
}

// backendOf is what slotOf or backendKeyOf was given: one of IPv4 has one word.
func backendOf(s []uint64) netip.AddrPort {
	var port [2]byte
	binary.NativeEndian.PutUint16(port[:], uint16(s[0]>>16))
	number := binary.BigEndian.Uint16(port[:])
	if len(s) == slotWords4 {
		var four [4]byte
		binary.NativeEndian.PutUint32(four[:], uint32(s[0]>>32))
		return netip.AddrPortFrom(netip.AddrFrom4(four), number)
	}
	var sixteen [16]byte
	binary.NativeEndian.PutUint64(sixteen[:8], s[1])
	binary.NativeEndian.PutUint64(sixteen[8:], s[2])
	return netip.AddrPortFrom(netip.AddrFrom16(sixteen), number)
}

// IsHost returns false for an address that cannot be connected to from any host.
func IsHost(a netip.Addr) bool {
	return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && a.Zone() == ""
}

// checkAddress returns an error for what is no host's address, or has no port.
func checkAddress(what string, a netip.AddrPort) error {
	switch {
	case !IsHost(a.Addr()):
		return fmt.Errorf("%s %v is not the address of a host", what, a)
	case a.Port() == 0:
		return fmt.Errorf("%s %v has no port", what, a)
	}
	return nil
}
