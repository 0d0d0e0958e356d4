// SPDX-License-Identifier: Apache-2.0

package lbtest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Echo sends back what comes to address, over TCP and UDP, until the test ends.
func (p *Pod) Echo(tb testing.TB, address string) {
	tb.Helper()
	p.do(tb, "Echo", address, nil)
}

// A Trip is how RoundTripTimes asks.
type Trip string

// Of each trip there is one socket for all questions.
const (
	Datagram  Trip = "udp"           // unconnected
	Connected Trip = "udp-connected" // connected
	Stream    Trip = "tcp"
)

// RoundTripTimes times n questions of one byte to address, each with its answer, by raw system calls, in nanoseconds.
func (p *Pod) RoundTripTimes(tb testing.TB, trip Trip, address string, n int) []int64 {
	tb.Helper()
	var times []int64
	p.do(tb, "RoundTripTimes", Target{Network: string(trip), Address: address, N: n}, &times)
	return times
}

// Echo is the order of the same name.
func (*Orders) Echo(address string, _ *struct{}) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp4", address)
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			file, err := conn.(*net.TCPConn).File()
			conn.Close()
			if err == nil {
				fd := int(file.Fd()) // which makes it blocking
				go echo(fd, func() { file.Close() })
			}
		}
	}()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		return err
	}
	go echo(fd, func() { unix.Close(fd) })
	return nil
}

// echo sends back what a socket receives, until that fails.
func echo(fd int, done func()) {
	defer done()
	runtime.LockOSThread()
	buffer := make([]byte, 64)
	for {
		n, from, err := unix.Recvfrom(fd, buffer, 0)
		if err != nil || n == 0 {
			return
		}
		if from == nil {
			_, err = unix.Write(fd, buffer[:n])
		} else {
			err = unix.Sendto(fd, buffer[:n], 0, from)
		}
		if err != nil {
			return
		}
	}
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

// RoundTripTimes is the order of the same name.
func (*Orders) RoundTripTimes(t Target, times *[]int64) error {
	address, err := netip.ParseAddrPort(t.Address)
	if err != nil {
		return err
	}
	to, kind := sockaddr(address), unix.SOCK_DGRAM
	if Trip(t.Network) == Stream {
		kind = unix.SOCK_STREAM
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience / time.Second)}); err != nil {
		return err
	}
	send := func(b []byte) error { return unix.Sendto(fd, b, 0, to) }
	if Trip(t.Network) != Datagram {
		if err := unix.Connect(fd, to); err != nil {
			return fmt.Errorf("connect to %s: %w", t.Address, err)
		}
		send = func(b []byte) error { _, err := unix.Write(fd, b); return err }
	}
	*times = make([]int64, t.N)
	buffer := make([]byte, 64)
	for i := range *times {
		start := time.Now()
		if err := send([]byte{'?'}); err != nil {
			return fmt.Errorf("send to %s: %w", t.Address, err)
		}
		// With a timeout the kernel does not go on by itself after one of the runtime's signals.
		_, _, err := unix.Recvfrom(fd, buffer, 0)
		for errors.Is(err, unix.EINTR) {
			_, _, err = unix.Recvfrom(fd, buffer, 0)
		}
		if err != nil {
			return fmt.Errorf("receive from %s: %w", t.Address, err)
		}
		(*times)[i] = int64(time.Since(start))
	}
	return nil
}
