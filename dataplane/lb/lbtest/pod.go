// SPDX-License-Identifier: Apache-2.0

package lbtest

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/rpc"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// patience is how long a connect or an answer may take, and briefly how long where none is expected.
const (
	patience = 2 * time.Second
	briefly  = 300 * time.Millisecond
)

// servePod takes orders from standard input until it ends.
func servePod() error {
	server := rpc.NewServer()
	if err := server.Register(&Orders{}); err != nil {
		return err
	}
	server.ServeConn(pipes{os.Stdin, os.Stdout})
	return nil
}

// Orders are what a pod does. They are exported for net/rpc.
type Orders struct {
	stop    chan struct{}
	outcome chan Outcome
	socket  net.PacketConn // of Exchange
	kept    net.Conn       // of AskKept
	held    []*net.TCPConn // of Hold
}

// A Target is what a pod listens at or connects to.
type Target struct {
	Network, Address string
	N                int
	Patience         time.Duration // 0: patience
	Size             int           // of what Exchange sends, in bytes; 0: 1
}

// An Origin is where ConnectFrom connects from, and to.
type Origin struct {
	Network, Host string
	Port          int
	Addresses     []string
}

// A Timing is what ConnectTimes connects to.
type Timing struct {
	N         int
	Addresses []string
	Whole     bool // from socket(2) to close(2)
}

// Up is Pod's order to bring the loopback interface up.
func (*Orders) Up(struct{}, *struct{}) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// AddAddress is the order of the same name.
func (*Orders) AddAddress(cidr string, _ *struct{}) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	address, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	// Else an address of IPv6 cannot be used until the kernel has come to find that loopback wants no duplicate address detection.
	address.Flags |= unix.IFA_F_NODAD
	return netlink.AddrAdd(lo, address)
}

// Listen is the order of the same name.
func (*Orders) Listen(t Target, _ *struct{}) error {
	if t.Network == "sctp" {
		return ListenSCTP(t.Address)
	}
	if t.Network == "udp" {
		conn, err := net.ListenPacket(t.Network, t.Address)
		if err != nil {
			return err
		}
		go func() {
			buffer := make([]byte, 16)
			for {
				_, from, err := conn.ReadFrom(buffer)
				if err != nil {
					return
				}
				conn.WriteTo(answerTo(from.String(), t.Address), from) // a lost answer is the client's error
			}
		}()
		return nil
	}
	listener, err := net.Listen(t.Network, t.Address)
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.Write(answerTo(conn.RemoteAddr().String(), t.Address)) // a lost answer is the client's error
			conn.Close()
		}
	}()
	return nil
}

// answerTo is what a server says to a client.
func answerTo(client, server string) []byte {
	if host, _, err := net.SplitHostPort(client); err == nil {
		client = host
	}
	return []byte(server + " " + client)
}

// Connect is the order of the same name.
func (*Orders) Connect(t Target, outcome *Outcome) error {
	*outcome = newOutcome()
	for range t.N {
		outcome.add(t.ask())
	}
	return nil
}

// ConnectFrom is the order of the same name.
func (*Orders) ConnectFrom(o Origin, outcome *Outcome) error {
	*outcome = newOutcome()
	var from net.Addr = &net.TCPAddr{IP: net.ParseIP(o.Host), Port: o.Port}
	if strings.HasPrefix(o.Network, "udp") {
		from = &net.UDPAddr{IP: net.ParseIP(o.Host), Port: o.Port}
	}
	// Several sockets may have one port, if they are connected to different peers.
	dialer := net.Dialer{Timeout: patience, LocalAddr: from, Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }), err)
	}}
	var conns []net.Conn
	for _, address := range o.Addresses {
		conn, err := dialer.Dial(o.Network, address)
		if err != nil {
			outcome.add(said{}, err)
			continue
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	for _, conn := range conns {
		outcome.add(askOn(conn, patience))
	}
	return nil
}

// Keep is the order of the same name.
func (o *Orders) Keep(t Target, _ *struct{}) (err error) {
	o.kept, err = Dial(t.Network, t.Address, patience)
	return err
}

// AskKept is the order of the same name.
func (o *Orders) AskKept(_ struct{}, outcome *Outcome) error {
	*outcome = newOutcome()
	outcome.add(askOn(o.kept, patience))
	return nil
}

// Open is the order of the same name.
func (o *Orders) Open(network string, _ *struct{}) (err error) {
	if network == "udp6" {
		o.socket, err = net.ListenPacket("udp", "[::]:0") // of both versions
	} else {
		o.socket, err = net.ListenPacket("udp4", "0.0.0.0:0")
	}
	return err
}

// Exchange is the order of the same name.
func (o *Orders) Exchange(t Target, outcome *Outcome) error {
	to, err := net.ResolveUDPAddr("udp", t.Address)
	if err != nil {
		return err
	}
	*outcome = newOutcome()
	for range t.N {
		outcome.add(exchange(o.socket, to, max(t.Size, 1), cmp.Or(t.Patience, patience)))
	}
	return nil
}

// exchange sends from an unconnected socket and returns the answer and who gave it.
func exchange(socket net.PacketConn, to *net.UDPAddr, size int, wait time.Duration) (said, error) {
	if err := socket.SetDeadline(time.Now().Add(wait)); err != nil {
		return said{}, err
	}
	if _, err := socket.WriteTo(make([]byte, size), to); err != nil {
		return said{}, err
	}
	answer := make([]byte, 128)
	n, from, err := socket.ReadFrom(answer)
	if err != nil {
		return said{}, err
	}
	return saying(answer[:n], from), nil
}

// StartHammer is Hammer's order.
func (o *Orders) StartHammer(t Target, _ *struct{}) error {
	o.stop, o.outcome = make(chan struct{}), make(chan Outcome)
	first := make(chan struct{})
	go func() {
		outcome := newOutcome()
		outcome.add(t.ask())
		close(first)
		for {
			select {
			case <-o.stop:
				o.outcome <- outcome
				return
			default:
				outcome.add(t.ask())
			}
		}
	}()
	<-first
	return nil
}

// StopHammer is the order of the function that Hammer returns.
func (o *Orders) StopHammer(_ struct{}, outcome *Outcome) error {
	close(o.stop)
	*outcome = <-o.outcome
	return nil
}

func newOutcome() Outcome {
	return Outcome{Answers: map[string]int{}, Peers: map[string]int{}, Clients: map[string]int{}, Errors: map[string]int{}}
}

// said is what a server answered, its address as the client sees it, and the client's as the server does.
type said struct{ answer, peer, client string }

func saying(answer []byte, peer net.Addr) said {
	server, client, _ := strings.Cut(string(answer), " ")
	return said{server, peer.String(), client}
}

func (o Outcome) add(s said, err error) {
	if err == nil {
		o.Answers[s.answer]++
		o.Peers[s.peer]++
		o.Clients[s.client]++
		return
	}
	var number syscall.Errno
	var late net.Error
	switch {
	case errors.As(err, &number):
		o.Errors[number.Error()]++
	case errors.As(err, &late) && late.Timeout():
		o.Errors[TimedOut]++
	default:
		o.Errors[err.Error()]++
	}
}

// ask connects and returns the server's answer.
func (t Target) ask() (said, error) {
	wait := cmp.Or(t.Patience, patience)
	if t.Network == "sctp" {
		return askSCTP(t.Address, wait)
	}
	conn, err := Dial(t.Network, t.Address, wait)
	if err != nil {
		return said{}, err
	}
	defer conn.Close()
	return askOn(conn, wait)
}

// askOn returns what the server of a connection answers.
func askOn(conn net.Conn, wait time.Duration) (_ said, err error) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		// An RST at the end leaves no TIME_WAIT, which would use the ports up.
		if err := tcp.SetLinger(0); err != nil {
			return said{}, err
		}
	}
	if err := conn.SetDeadline(time.Now().Add(wait)); err != nil {
		return said{}, err
	}
	answer, peer := make([]byte, 128), conn.RemoteAddr()
	var n int
	if udp, ok := conn.(*net.UDPConn); ok {
		if _, err := udp.Write([]byte{'?'}); err != nil {
			return said{}, err
		}
		// A resolver drops what comes from any other address than getpeername(2) says.
		var from net.Addr
		if n, from, err = udp.ReadFrom(answer); err == nil && from.String() != peer.String() {
			return said{}, fmt.Errorf("connected to %v, answered by %v", peer, from)
		}
	} else {
		n, err = conn.Read(answer)
	}
	return saying(answer[:n], peer), err
}

// Dial connects to an address. An IPv4 address is mapped into IPv6 if the network says 6 (RFC 4291, 2.5.5.2), which package
// net never does.
func Dial(network, address string, wait time.Duration) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	if to.Addr().Is6() || !strings.HasSuffix(network, "6") {
		return net.DialTimeout(network, address, wait)
	}
	kind := unix.SOCK_STREAM
	if network == "udp6" {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(unix.AF_INET6, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), address)
	defer file.Close()
	if err := unix.Connect(fd, &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}); err != nil {
		return nil, err
	}
	return net.FileConn(file)
}

// Sink is the order of the same name.
func (*Orders) Sink(address string, _ *struct{}) error {
	listener, err := net.Listen("tcp4", address)
	if err != nil {
		return err
	}
	file, err := listener.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	fd := int(file.Fd())
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	go func() {
		defer listener.Close()
		defer file.Close() // Subtle: and so not before, as a finalizer would
		for range time.Tick(5 * time.Millisecond) {
			for {
				conn, _, err := unix.Accept(fd)
				if err != nil {
					break
				}
				unix.Close(conn)
			}
		}
	}()
	return nil
}

// ConnectTimes is the order of the same name.
func (*Orders) ConnectTimes(t Timing, times *[]int64) error {
	targets := make([]unix.Sockaddr, len(t.Addresses))
	for i, a := range t.Addresses {
		address, err := netip.ParseAddrPort(a)
		if err != nil {
			return err
		}
		targets[i] = &unix.SockaddrInet4{Addr: address.Addr().As4(), Port: int(address.Port())}
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	*times = make([]int64, t.N)
	for i := range *times {
		nanoseconds, err := timeConnect(targets[i%len(targets)], t.Whole)
		if err != nil {
			return fmt.Errorf("connect to %s: %w", t.Addresses[i%len(targets)], err)
		}
		(*times)[i] = nanoseconds
	}
	return nil
}

// timeConnect times a connect, or all of a socket's life.
func timeConnect(target unix.Sockaddr, whole bool) (int64, error) {
	born := time.Now()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, errors.Join(err, unix.Close(fd))
	}
	start := time.Now()
	err = unix.Connect(fd, target)
	took := time.Since(start)
	err = errors.Join(err, unix.Close(fd))
	if whole {
		took = time.Since(born)
	}
	return took.Nanoseconds(), err
}
