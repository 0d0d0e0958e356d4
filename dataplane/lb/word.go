// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// Protocol is an IP protocol number.
type Protocol uint8

// The protocols that connect4 sees.
const (
	TCP Protocol = 6
	UDP Protocol = 17
)

func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// A Frontend is what clients connect to.
type Frontend struct {
	Address  netip.AddrPort // IPv4
	Protocol Protocol
}

func (f Frontend) String() string { return fmt.Sprintf("%v/%v", f.Address, f.Protocol) }

// A key is a Frontend as its entry has it: address and port in network byte order, protocol, scope. See struct
// frontend in connect.bpf.c.
type key [8]byte

// keyOf expects a Frontend that check passed.
func keyOf(f Frontend) (k key) {
	address := f.Address.Addr().Unmap().As4()
	copy(k[:4], address[:])
	binary.BigEndian.PutUint16(k[4:6], f.Address.Port())
	k[6] = byte(f.Protocol)
	return k
}

func (k key) frontend() Frontend {
	address := netip.AddrFrom4([4]byte(k[:4]))
	return Frontend{
		Address:  netip.AddrPortFrom(address, binary.BigEndian.Uint16(k[4:6])),
		Protocol: Protocol(k[6]),
	}
}

// bits is the key as the map holds it, and keyOfBits what it was made of.
func (k key) bits() uint64 { return binary.NativeEndian.Uint64(k[:]) }

func keyOfBits(bits uint64) (k key) {
	binary.NativeEndian.PutUint64(k[:], bits)
	return k
}

// A word says where a frontend's backends are: {base:32, count:16, owner:16}. They are those from base on, of its entry if
// base is one there, else of the backends map, whose first entries are not used.
type word uint64

// maxCount is how many backends one frontend can have.
const maxCount = 1<<16 - 1

func makeWord(base, count int, owner uint64) word {
	return word(uint64(base)<<32 | uint64(count)<<16 | owner)
}

func (w word) base() int     { return int(w >> 32) }
func (w word) count() int    { return int(w >> 16 & maxCount) }
func (w word) owner() uint64 { return uint64(w & 0xffff) }

// inline tells whether the backends, if any, are in the entry.
func (w word) inline() bool { return w.base() < entryWords }

// region is the part of the backends map that a word claims which is not inline.
func (w word) region() region { return regionFor(w.base(), w.count()) }

// unused is the part of the backends map that no word can lead to.
var unused = regionFor(0, entryWords)

// entryOf is a backend as the backends map has it: {address:32, port:16, owner:16}.
func entryOf(backend netip.AddrPort, owner uint64) uint64 {
	address := backend.Addr().Unmap().As4()
	var port [2]byte
	binary.BigEndian.PutUint16(port[:], backend.Port())
	return uint64(binary.NativeEndian.Uint32(address[:]))<<32 | uint64(binary.NativeEndian.Uint16(port[:]))<<16 | owner
}

// checkAddress returns an error for what is not an IPv4 address with a port. IPv4 mapped into IPv6 is IPv4.
func checkAddress(what string, a netip.AddrPort) error {
	if !a.Addr().Unmap().Is4() {
		return fmt.Errorf("%s %v is not IPv4", what, a)
	}
	if a.Port() == 0 {
		return fmt.Errorf("%s %v has no port", what, a)
	}
	return nil
}
