// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// drainEvery is how long the accept queue fills before it is drained. A server that is woken by each connection runs,
	// or does not, on the client's CPU in the middle of its connect, which makes connect times bimodal. At 30,000 connects
	// a second 150 connections gather in this time.
	drainEvery = 5 * time.Millisecond
	// lookUp is how long a server without load blocks before it looks whether it is to end.
	lookUp = 250 * time.Millisecond
	// backlog is what listen(2) asks for; the kernel caps it at net.core.somaxconn.
	backlog = 1<<16 - 1
)

// listenQueue opens a non-blocking listening socket and returns it with the address that it got.
func listenQueue(address netip.AddrPort) (int, netip.AddrPort, error) {
	family, local := unix.AF_INET, unix.Sockaddr(nil)
	if address.Addr().Is4() {
		local = &unix.SockaddrInet4{Port: int(address.Port()), Addr: address.Addr().As4()}
	} else {
		family, local = unix.AF_INET6, &unix.SockaddrInet6{Port: int(address.Port()), Addr: address.Addr().As16()}
	}
	socket, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, netip.AddrPort{}, os.NewSyscallError("socket", err)
	}
	bound, err := bindQueue(socket, local)
	if err != nil {
		unix.Close(socket)
		return -1, netip.AddrPort{}, err
	}
	return socket, bound, nil
}

func bindQueue(socket int, local unix.Sockaddr) (netip.AddrPort, error) {
	if err := unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return netip.AddrPort{}, os.NewSyscallError("set SO_REUSEADDR", err)
	}
	if err := unix.Bind(socket, local); err != nil {
		return netip.AddrPort{}, os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(socket, backlog); err != nil {
		return netip.AddrPort{}, os.NewSyscallError("listen", err)
	}
	name, err := unix.Getsockname(socket)
	if err != nil {
		return netip.AddrPort{}, os.NewSyscallError("getsockname", err)
	}
	switch name := name.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(name.Addr), uint16(name.Port)), nil
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(name.Addr), uint16(name.Port)), nil
	}
	return netip.AddrPort{}, fmt.Errorf("getsockname: unexpected %T", name)
}

// drain empties the accept queues every drainEvery while there is load, until ctx ends. Without load it blocks, so that the
// servers of sites that are not measured take no CPU from the one that is.
//
// Subtle: what it took it closes one turn later. The connection stands in the queue while the client's connect(2) has yet to
// return; closed at once, it would now and then send into that call. One turn later the client has reset it, and closing
// sends nothing. A client that was held up for so long gets a FIN, which leaves its connect(2) a success, and its RST then
// spares the server the TIME_WAIT. Closing by RST at once was tried: two connects in 180,000 failed with ECONNRESET.
func (s *server) drain(ctx context.Context) {
	var held []int
	defer func() { closeAll(held) }()
	waiting := make([]unix.PollFd, len(s.queues))
	for i, queue := range s.queues {
		waiting[i] = unix.PollFd{Fd: int32(queue), Events: unix.POLLIN}
	}
	for ctx.Err() == nil {
		if len(held) == 0 {
			// Whatever it returns, the queues are looked at.
			unix.Poll(waiting, int(lookUp.Milliseconds()))
		}
		// By a system call of its own: a Go timer wakes other threads too, and they are charged to the server.
		turn := unix.NsecToTimespec(drainEvery.Nanoseconds())
		unix.Nanosleep(&turn, nil)
		closeAll(held)
		held = held[:0]
		for _, queue := range s.queues {
			held = drainQueue(queue, held)
		}
		s.accepted.Add(int64(len(held)))
	}
}

// drainQueue accepts what waits in a listening socket and appends it to held.
func drainQueue(queue int, held []int) []int {
	for {
		// Raw, because it cannot block and the peer's address is not wanted.
		connection, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(queue), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
		switch errno {
		case 0:
			held = append(held, int(connection))
		case unix.EINTR, unix.ECONNABORTED:
		default: // EAGAIN; what else there is (EMFILE, ENOBUFS) leaves the queue to the next turn, and shows as overflows
			return held
		}
	}
}

func closeAll(sockets []int) {
	for _, s := range sockets {
		unix.Close(s)
	}
}

// listenCounts are the counters of connections that found an accept queue full.
type listenCounts struct {
	overflows, drops int64
}

// readListenCounts reads the counters of the network namespace that the calling thread is in.
func readListenCounts() (listenCounts, error) {
	const file = "/proc/thread-self/net/netstat"
	content, err := os.ReadFile(file)
	if err != nil {
		return listenCounts{}, fmt.Errorf("read accept queue counters: %w", err)
	}
	counts, err := parseListenCounts(string(content))
	if err != nil {
		return listenCounts{}, fmt.Errorf("read accept queue counters: %s: %w", file, err)
	}
	return counts, nil
}

// parseListenCounts takes TcpExt's ListenOverflows and ListenDrops from the text of /proc/net/netstat: pairs of lines, names
// above values (net/ipv4/proc.c).
func parseListenCounts(netstat string) (listenCounts, error) {
	var counts listenCounts
	var names []string
	for line := range strings.Lines(netstat) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != "TcpExt:" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		found := 0
		for i, name := range names[:min(len(names), len(fields))] {
			var into *int64
			switch name {
			case "ListenOverflows":
				into = &counts.overflows
			case "ListenDrops":
				into = &counts.drops
			default:
				continue
			}
			var err error
			if *into, err = strconv.ParseInt(fields[i], 10, 64); err != nil {
				return listenCounts{}, fmt.Errorf("%s: %w", name, err)
			}
			found++
		}
		if found == 2 {
			return counts, nil
		}
	}
	return listenCounts{}, fmt.Errorf("no ListenOverflows and ListenDrops under TcpExt")
}
