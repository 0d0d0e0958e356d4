// SPDX-License-Identifier: Apache-2.0

package lbtest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

// What begins an association of SCTP, by raw sockets, as many kernels come without SCTP: an INIT chunk and its acknowledgement (RFC 9260,
// sections 3.1, 3.3.2 and 3.3.3), whose one parameter is the server's answer.
const (
	sctpInit, sctpInitAck = 1, 2
	sctpHeader            = 12
	sctpFixed             = sctpHeader + 20 // where parameters begin
	sctpParameter         = 0xc0de          // of a type that nobody knows
)

// sctpPacket is a packet with one chunk. Its checksum is right.
func sctpPacket(from, to uint16, verification uint32, kind byte, tag uint32, text []byte) []byte {
	padded := (len(text) + 3) / 4 * 4
	b := make([]byte, sctpFixed, sctpFixed+4+padded)
	binary.BigEndian.PutUint16(b, from)
	binary.BigEndian.PutUint16(b[2:], to)
	binary.BigEndian.PutUint32(b[4:], verification)
	b[sctpHeader] = kind
	binary.BigEndian.PutUint32(b[sctpHeader+4:], tag)
	binary.BigEndian.PutUint32(b[sctpHeader+8:], 1<<16) // receiver window
	binary.BigEndian.PutUint16(b[sctpHeader+12:], 1)    // streams, out and in
	binary.BigEndian.PutUint16(b[sctpHeader+14:], 1)
	if text != nil {
		b = binary.BigEndian.AppendUint16(b, sctpParameter)
		b = binary.BigEndian.AppendUint16(b, uint16(4+len(text)))
		b = append(b, text...)
		b = b[:sctpFixed+4+padded]
	}
	binary.BigEndian.PutUint16(b[sctpHeader+2:], uint16(len(b)-sctpHeader))
	binary.LittleEndian.PutUint32(b[8:], sctpChecksum(b))
	return b
}

// sctpChecksum is what belongs at the eighth byte, whatever is there.
func sctpChecksum(packet []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	sum := crc32.Update(0, table, packet[:8])
	sum = crc32.Update(sum, table, make([]byte, 4))
	return crc32.Update(sum, table, packet[sctpHeader:])
}

// readSCTP returns the next packet with a chunk of that kind to a port. One with a wrong checksum is an error.
func readSCTP(conn *net.IPConn, kind byte, port uint16) ([]byte, *net.IPAddr, error) {
	buffer := make([]byte, 2048)
	for {
		n, from, err := conn.ReadFromIP(buffer)
		if err != nil {
			return nil, nil, err
		}
		b := buffer[:n]
		if n < sctpFixed || b[sctpHeader] != kind || binary.BigEndian.Uint16(b[2:]) != port {
			continue
		}
		if binary.LittleEndian.Uint32(b[8:]) != sctpChecksum(b) {
			return nil, nil, errors.New("wrong SCTP checksum")
		}
		return b, from, nil
	}
}

// rawSCTP names the network of raw sockets for an address.
func rawSCTP(a netip.Addr) string {
	if a.Is4() {
		return "ip4:132"
	}
	return "ip6:132"
}

// ListenSCTP answers who begins an association at an address: with the address, and his own.
func ListenSCTP(address string) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	conn, err := net.ListenIP(rawSCTP(at.Addr()), &net.IPAddr{IP: at.Addr().AsSlice()})
	if err != nil {
		return err
	}
	go func() {
		for {
			b, from, err := readSCTP(conn, sctpInit, at.Port())
			if err != nil {
				return
			}
			answer := sctpPacket(at.Port(), binary.BigEndian.Uint16(b), binary.BigEndian.Uint32(b[sctpHeader+4:]), sctpInitAck, 7, answerTo(from.IP.String(), address))
			conn.WriteToIP(answer, from) // a lost answer is the client's error
		}
	}()
	return nil
}

// AskSCTP begins an association and returns what the server answers, its address and the client's.
func AskSCTP(address string, wait time.Duration) (server, client string, err error) {
	s, err := askSCTP(address, wait)
	return s.answer, s.client, err
}

// sctpPorts counts the ports that clients of this process had, from the first one on, which is any. None comes again soon: conntrack would
// take it for the flow that it knows, with the endpoint of that time.
var (
	firstSCTPPort = rand.Uint32N(20000)
	sctpPorts     atomic.Uint32
)

func askSCTP(address string, wait time.Duration) (said, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return said{}, err
	}
	// Connected, a raw socket has the answers of one host, and the refusals.
	conn, err := net.DialIP(rawSCTP(to.Addr()), nil, &net.IPAddr{IP: to.Addr().AsSlice()})
	if err != nil {
		return said{}, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(wait)); err != nil {
		return said{}, err
	}
	port, tag := uint16(20000+(firstSCTPPort+sctpPorts.Add(1))%20000), rand.Uint32()|1
	if _, err := conn.Write(sctpPacket(port, to.Port(), 0, sctpInit, tag, nil)); err != nil {
		return said{}, err
	}
	b, from, err := readSCTP(conn, sctpInitAck, port)
	if err != nil {
		return said{}, err
	}
	if got := binary.BigEndian.Uint32(b[4:]); got != tag {
		return said{}, fmt.Errorf("verification tag %#x, want %#x", got, tag)
	}
	length := int(binary.BigEndian.Uint16(b[sctpFixed+2:]))
	peer := &net.TCPAddr{IP: from.IP, Port: int(binary.BigEndian.Uint16(b))}
	return saying(b[sctpFixed+4:sctpFixed+length], peer), nil
}
