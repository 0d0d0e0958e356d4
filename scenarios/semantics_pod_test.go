// SPDX-License-Identifier: Apache-2.0

package scenarios_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/rpc"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/lab"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
)

// What a lab starts of this test's binary, in place of plimsoll, when its plan names it: a pod of the test's own, which says more of
// a connection than package load does and keeps sockets, and else plimsoll itself, from the file that the variable names.
const (
	podCommand      = "semantics-pod"
	programVariable = "PLIMSOLL_SEMANTICS_PROGRAM"
)

func TestMain(m *testing.M) {
	program := os.Getenv(programVariable)
	switch {
	case program == "":
		os.Exit(m.Run())
	case len(os.Args) > 1 && os.Args[1] == podCommand:
		server := rpc.NewServer()
		if err := server.Register(&Orders{kept: map[string]net.Conn{}, loose: map[bool]net.PacketConn{}}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		server.ServeConn(stream{os.Stdin, os.Stdout})
	default:
		fmt.Fprintln(os.Stderr, "start plimsoll:", syscall.Exec(program, append([]string{program}, os.Args[1:]...), os.Environ()))
		os.Exit(1)
	}
}

// What came of a connect or an exchange that nobody answered. Other errors stand for themselves.
const (
	refused      = "refused"
	silence      = "silence"
	notPermitted = "not permitted"
	ended        = "ended"
	taken        = "address taken"
	unspoken     = "protocol not spoken"
	healthy      = "200 OK" // of a health check
	unhealthy    = "503 Service Unavailable"
)

// A guest is a process in a pod that a test gives orders to.
type guest struct {
	clusters.Pod
	addresses []netip.Addr
	orders    *rpc.Client
}

// mustStart starts a guest that ends with its lab.
func mustStart(t *testing.T, pod clusters.Pod) *guest {
	t.Helper()
	p, err := pod.Start(t.Context(), podCommand)
	if err != nil {
		t.Fatal(err)
	}
	addresses, err := lab.Addresses(pod)
	if err != nil {
		t.Fatal(err)
	}
	return &guest{pod, addresses, rpc.NewClient(stream{p.Stdout(), p.Stdin()})}
}

// listen has the guest answer at these addresses, over TCP, UDP and, as far as an association's beginning, SCTP.
func (g *guest) listen(t *testing.T, addresses ...string) {
	t.Helper()
	if err := g.orders.Call("Orders.Listen", addresses, &struct{}{}); err != nil {
		t.Fatalf("%s: %v", g.Name(), err)
	}
}

// ask has the guest ask a question and returns what came of it. That the guest is gone is an error of the outcome.
func (g *guest) ask(q Question) Outcome {
	var outcome Outcome
	if err := g.orders.Call("Orders.Ask", q, &outcome); err != nil {
		outcome.Errors = map[string]int{fmt.Sprintf("%s: %v", g.Name(), err): 1}
	}
	return outcome
}

// A Question is what a guest is to ask servers. It is exported for net/rpc, as are Outcome and Orders.
type Question struct {
	// Network and Address are where to connect to, N times, each with a socket of its own. From tcp6 and udp6 an IPv4 address is asked
	// by a socket of IPv6.
	Network, Address string
	N                int
	// Keep names a socket that asks all the questions, and stays open. It is connected to Address if there is none of that name, unless
	// Loose is set: then it is unconnected, and sends each datagram to Address.
	Keep  string
	Loose bool
	// Port is the client's; zero is any.
	Port int
	// Patience is how long one answer may take. A datagram is sent again meanwhile, as any may be lost.
	Patience time.Duration
}

// An Outcome counts the servers that answered, by their own address; what they saw as the client's; and errors.
type Outcome struct {
	Servers, Clients, Errors map[string]int
}

// String is the outcome on one line.
func (o Outcome) String() string {
	return fmt.Sprintf("answers of %v, which saw %v; errors %v", o.Servers, o.Clients, o.Errors)
}

// Orders are what a guest does.
type Orders struct {
	ports int // of the client, that were used up
	kept  map[string]net.Conn
	loose map[bool]net.PacketConn // by whether they speak IPv4
}

// Listen is guest's order of that name.
func (*Orders) Listen(addresses []string, _ *struct{}) error {
	for _, address := range addresses {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		// Subtle: bound to the address, because an answer from a socket that is bound to none has the address of the way back.
		packets, err := net.ListenPacket("udp", address)
		if err != nil {
			return err
		}
		if err := lbtest.ListenSCTP(address); err != nil {
			return err
		}
		go serveStreams(listener)
		go servePackets(packets)
	}
	return nil
}

// serveStreams answers each line with the line, the server's address and the client's.
func serveStreams(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			for lines := bufio.NewScanner(conn); lines.Scan(); {
				if _, err := fmt.Fprintln(conn, lines.Text(), conn.LocalAddr(), conn.RemoteAddr()); err != nil {
					return // the client's error, too
				}
			}
		}()
	}
}

func servePackets(c net.PacketConn) {
	buffer := make([]byte, 64)
	for {
		n, from, err := c.ReadFrom(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			fmt.Fprintln(to{c, from}, string(buffer[:n]), c.LocalAddr(), from) // a lost answer is the client's error
		}
	}
}

// Ask is guest's order of that name.
func (o *Orders) Ask(q Question, outcome *Outcome) error {
	*outcome = Outcome{Servers: map[string]int{}, Clients: map[string]int{}, Errors: map[string]int{}}
	for i := range q.N {
		server, client, err := o.ask(q, i)
		if err == nil {
			outcome.Servers[server]++
			outcome.Clients[client]++
			continue
		}
		outcome.Errors[errorOf(err)]++
	}
	return nil
}

func (o *Orders) ask(q Question, i int) (server, client string, err error) {
	switch {
	case q.Loose:
		return o.askLoosely(q)
	case q.Network == "sctp":
		return lbtest.AskSCTP(q.Address, q.Patience)
	case q.Network == "http":
		return "", "", getHealth(q)
	case q.Network == "icmp":
		return "", "", ping(q)
	}
	conn, kept := o.kept[q.Keep]
	if !kept {
		if conn, err = o.dial(q); err != nil {
			return "", "", err
		}
		if q.Keep != "" {
			o.kept[q.Keep] = conn
		} else {
			defer conn.Close()
		}
		if tcp, ok := conn.(*net.TCPConn); ok {
			// An RST at the end leaves no TIME_WAIT, which would use the ports up.
			if err := tcp.SetLinger(0); err != nil {
				return "", "", err
			}
		}
	}
	return converse(conn, strconv.FormatInt(time.Now().UnixNano()+int64(i), 36), q.Patience)
}

// getHealth asks a health check's server, whose status is the error.
func getHealth(q Question) error {
	client := http.Client{Timeout: q.Patience, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get("http://" + q.Address + "/healthz")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	return errors.New(response.Status)
}

// ping sends an echo request to the host of an address, to which no server here has an answer.
func ping(q Question) error {
	host, _, err := net.SplitHostPort(q.Address)
	if err != nil {
		return err
	}
	// Echo request, checksum, identifier, sequence number (RFC 792, RFC 4443). The kernel fills in the checksum of ICMPv6.
	network, echo := "ip4:icmp", []byte{8, 0, 0xf7, 0xfd, 0, 1, 0, 1}
	if strings.Contains(host, ":") {
		network, echo = "ip6:ipv6-icmp", []byte{128, 0, 0, 0, 0, 1, 0, 1}
	}
	conn, err := net.Dial(network, host) // connected, it is told of errors
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(q.Patience)); err != nil {
		return err
	}
	if _, err := conn.Write(echo); err != nil {
		return err
	}
	if _, err := conn.Read(make([]byte, 64)); err != nil {
		return err
	}
	return errors.New("echo")
}

// Ports that UDP sockets are bound to, below those that the kernel gives out.
const firstPort, lastPort = 10000, 32000

// dial connects a socket. One of UDP has a port that none had before: what conntrack knows of a flow outlives the socket, and is none
// of the next one's affair.
func (o *Orders) dial(q Question) (net.Conn, error) {
	dialer := net.Dialer{Timeout: q.Patience}
	switch {
	case strings.HasSuffix(q.Network, "6"):
		return lbtest.Dial(q.Network, q.Address, q.Patience)
	case q.Network == "udp":
		o.ports++
		dialer.LocalAddr = &net.UDPAddr{Port: firstPort + o.ports%(lastPort-firstPort)}
	case q.Port != 0:
		dialer.LocalAddr = &net.TCPAddr{Port: q.Port}
		// Several sockets may have one port, if they are connected to different peers.
		dialer.Control = func(_, _ string, c syscall.RawConn) error {
			var failed error
			err := c.Control(func(fd uintptr) {
				failed = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
			})
			return errors.Join(err, failed)
		}
	}
	return dialer.Dial(q.Network, q.Address)
}

// askLoosely asks from the one unconnected socket that a guest has of a family.
func (o *Orders) askLoosely(q Question) (server, client string, err error) {
	address, err := net.ResolveUDPAddr("udp", q.Address)
	if err != nil {
		return "", "", err
	}
	network, is4 := "udp6", address.IP.To4() != nil
	if is4 {
		network = "udp4"
	}
	if o.loose[is4] == nil {
		if o.loose[is4], err = net.ListenPacket(network, ":0"); err != nil {
			return "", "", err
		}
	}
	return converse(to{o.loose[is4], address}, strconv.FormatInt(time.Now().UnixNano(), 36), q.Patience)
}

// resend is when a datagram that was not answered is sent again.
const resend = 100 * time.Millisecond

// converse sends a line and awaits the answer to it.
func converse(conn net.Conn, question string, patience time.Duration) (server, client string, err error) {
	deadline := time.Now().Add(patience)
	_, stream := conn.(*net.TCPConn)
	// A socket that is kept has the deadline of its last question.
	if err := conn.SetDeadline(deadline); err != nil {
		return "", "", err
	}
	for {
		if _, err := io.WriteString(conn, question+"\n"); err != nil {
			return "", "", err
		}
		limit := time.Now().Add(resend)
		if stream || limit.After(deadline) {
			limit = deadline
		}
		if err := conn.SetDeadline(limit); err != nil {
			return "", "", err
		}
		server, client, err = answerTo(conn, question)
		if !errors.Is(err, os.ErrDeadlineExceeded) || limit.Equal(deadline) {
			return server, client, err
		}
		if err := conn.SetDeadline(deadline); err != nil {
			return "", "", err
		}
	}
}

// answerTo reads until the answer comes that repeats the question: those to earlier ones may be late.
func answerTo(conn net.Conn, question string) (server, client string, err error) {
	buffer := make([]byte, 256)
	for {
		n, err := conn.Read(buffer)
		if err != nil {
			return "", "", err
		}
		fields := strings.Fields(string(buffer[:n]))
		if len(fields) != 3 {
			return "", "", fmt.Errorf("answer %q", buffer[:n])
		}
		if fields[0] != question {
			continue
		}
		host, _, err := net.SplitHostPort(fields[2])
		return fields[1], host, err
	}
}

// errorOf is the key of Outcome.Errors for an error of package net.
func errorOf(err error) string {
	var late net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return refused
	case errors.Is(err, syscall.EPERM):
		return notPermitted
	case errors.Is(err, syscall.EDESTADDRREQ), errors.Is(err, syscall.ECONNABORTED): // at the next datagram, or while one is awaited
		return ended
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return taken
	case errors.Is(err, syscall.ENOPROTOOPT), errors.Is(err, syscall.EPROTO): // by ICMP and ICMPv6, from a kernel without SCTP
		return unspoken
	case errors.As(err, &late) && late.Timeout():
		return silence
	}
	return err.Error()
}

// to is a connection over an unconnected socket. An answer from another address than was asked is an error.
type to struct {
	net.PacketConn
	peer net.Addr
}

func (t to) RemoteAddr() net.Addr        { return t.peer }
func (t to) Write(b []byte) (int, error) { return t.WriteTo(b, t.peer) }
func (t to) Read(b []byte) (int, error) {
	n, from, err := t.ReadFrom(b)
	if err == nil && from.String() != t.peer.String() {
		err = fmt.Errorf("asked %v, answered by %v", t.peer, from)
	}
	return n, err
}

// stream makes one stream of two.
type stream struct {
	io.Reader
	io.WriteCloser
}
