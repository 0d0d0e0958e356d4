// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func ports(ip netip.Addr, numbers ...uint16) (addresses []netip.AddrPort) {
	for _, n := range numbers {
		addresses = append(addresses, netip.AddrPortFrom(ip, n))
	}
	return addresses
}

func TestConnectRecordsEveryOperation(t *testing.T) {
	p := mustPods(t)
	addresses := ports(serverIP, 8080, 8081, 8082)
	server, _, _ := mustServer(t, p.server, ServeOptions{Connect: addresses, Somaxconn: 1 << 16})
	client, _ := mustClient(t, p.client)
	reply := mustDo(t, client, Request{Addresses: addresses, Count: 5000, Warmup: 100, Seed: 1})
	if len(reply.Latencies) != 5000 || reply.Failed() != 0 {
		t.Errorf("%d latencies, errors %v; want 5000 and none", len(reply.Latencies), reply.Errors)
	}
	var sum time.Duration
	for i, l := range reply.Latencies {
		if l <= 0 {
			t.Fatalf("latency %d is %d ns", i, l)
		}
		sum += time.Duration(l)
	}
	if sum > reply.Elapsed {
		t.Errorf("connects took %s together, more than the %s that passed", sum, reply.Elapsed)
	}
	if reply.CPU <= 0 || reply.CPU > 2*reply.Elapsed {
		t.Errorf("client used %s of CPU in %s", reply.CPU, reply.Elapsed)
	}
	report := mustDrain(t, server, 5100)
	if report.Accepted != 5100 {
		t.Errorf("server accepted %d connections of 5100", report.Accepted)
	}
	if report.Overflows != 0 || report.Drops != 0 {
		t.Errorf("accept queue lost connections: %+v", report)
	}
}

// mustDrain waits until the server has accepted so many connections.
func mustDrain(tb testing.TB, server *Server, want int64) Report {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 10*time.Second)
	defer cancel()
	for {
		report, err := server.Report(ctx)
		if err != nil {
			tb.Fatalf("waiting for %d connections: %v", want, err)
		}
		if report.Accepted >= want {
			return report
		}
	}
}

// The medians of five runs on one path lie within a factor of 1.5 of each other even on a machine that does other things.
func TestConnectMedianRepeats(t *testing.T) {
	p := mustPods(t)
	addresses := ports(serverIP, 8080)
	mustServer(t, p.server, ServeOptions{Connect: addresses, Somaxconn: 1 << 16})
	client, _ := mustClient(t, p.client)
	var medians []int64
	for round := range 5 {
		reply := mustDo(t, client, Request{Addresses: addresses, Count: 2000, Warmup: 200, Seed: uint64(round)})
		medians = append(medians, Summarize(reply.Latencies).P50)
	}
	t.Logf("medians: %v ns", medians)
	s := Summarize(medians)
	if float64(s.Max) > 1.5*float64(s.P50) || s.P50 > time.Millisecond.Nanoseconds() {
		t.Errorf("medians differ too much: %v ns", medians)
	}
}

func TestConnectNeedsNoPortsAndLeavesNoTimeWait(t *testing.T) {
	p := mustPods(t)
	err := inNamespace(p.client, func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40099"), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	addresses := ports(serverIP, 8080)
	server, _, serverChild := mustServer(t, p.server, ServeOptions{Connect: addresses, Somaxconn: 1 << 16})
	client, clientChild := mustClient(t, p.client)
	reply := mustDo(t, client, Request{Addresses: addresses, Count: 30000})
	if len(reply.Latencies) != 30000 || reply.Failed() != 0 {
		t.Errorf("%d of 30000 connects through 100 ports succeeded; errors %v", len(reply.Latencies), reply.Errors)
	}
	mustDrain(t, server, 30000)
	if n := timeWait(t, clientChild) + timeWait(t, serverChild); n != 0 {
		t.Errorf("%d sockets in TIME_WAIT", n)
	}
}

func TestConnectCountsErrors(t *testing.T) {
	p := mustPods(t)
	mustServer(t, p.server, ServeOptions{Connect: ports(serverIP, 8080)})
	client, _ := mustClient(t, p.client)
	reply := mustDo(t, client, Request{
		Addresses: []netip.AddrPort{
			netip.AddrPortFrom(serverIP, 8080),
			netip.AddrPortFrom(serverIP, 9), // nobody listens
			netip.AddrPortFrom(blackHoleIP, 8080),
			netip.MustParseAddrPort("203.0.113.1:80"), // no route
		},
		Count: 40, Timeout: 30 * time.Millisecond,
	})
	want := map[string]int64{"ECONNREFUSED": 10, "timeout": 10, "ENETUNREACH": 10}
	if diff := cmp.Diff(want, reply.Errors); diff != "" || len(reply.Latencies) != 10 {
		t.Errorf("%d successes; errors (-want +got):\n%s", len(reply.Latencies), diff)
	}
	if least := 10 * 30 * time.Millisecond; reply.Elapsed < least || reply.Elapsed > 10*least {
		t.Errorf("ten time-outs of 30 ms took %s", reply.Elapsed)
	}
}

func TestConnectByIPv6AndMappedAddress(t *testing.T) {
	p := mustPods(t)
	addresses := []netip.AddrPort{netip.MustParseAddrPort("[::1]:8080"), netip.MustParseAddrPort("[::ffff:127.0.0.1]:8080")}
	mustServer(t, p.client, ServeOptions{Connect: []netip.AddrPort{netip.MustParseAddrPort("[::]:8080")}})
	client, _ := mustClient(t, p.client)
	if reply := mustDo(t, client, Request{Addresses: addresses, Count: 10}); len(reply.Latencies) != 10 {
		t.Errorf("errors: %v", reply.Errors)
	}
}

func TestPacedConnectsKeepTheSchedule(t *testing.T) {
	p := mustPods(t)
	addresses := ports(serverIP, 8080)
	mustServer(t, p.server, ServeOptions{Connect: addresses})
	client, _ := mustClient(t, p.client)
	reply := mustDo(t, client, Request{Addresses: addresses, Count: 200, Warmup: 20, Rate: 500})
	if len(reply.Latencies) != 200 {
		t.Fatalf("%d latencies, errors %v; want 200 and none", len(reply.Latencies), reply.Errors)
	}
	// The last of 200 is due after 199 intervals of 2 ms.
	if least := 398 * time.Millisecond; reply.Elapsed < least || reply.Elapsed > least+time.Second {
		t.Errorf("200 connects at 500 a second took %s", reply.Elapsed)
	}
}

// A connect that hangs makes those that were due meanwhile late: they are sent all the same, and counted.
func TestPacedConnectsAreNeverOmitted(t *testing.T) {
	p := mustPods(t)
	addresses := ports(serverIP, 8080)
	mustServer(t, p.server, ServeOptions{Connect: addresses})
	client, _ := mustClient(t, p.client)
	addresses = append(addresses, netip.AddrPortFrom(blackHoleIP, 8080))
	reply := mustDo(t, client, Request{Addresses: addresses, Count: 20, Rate: 1000, Timeout: 50 * time.Millisecond})
	if len(reply.Latencies) != 10 || reply.Errors["timeout"] != 10 {
		t.Fatalf("%d successes, errors %v; want 10 and 10 time-outs", len(reply.Latencies), reply.Errors)
	}
	if reply.Late < 15 {
		t.Errorf("%d operations were late, want nearly all", reply.Late)
	}
}

func TestLimitBoundsARequest(t *testing.T) {
	p := mustPods(t)
	client, _ := mustClient(t, p.client)
	reply := mustDo(t, client, Request{Addresses: ports(blackHoleIP, 1), Count: 1000, Timeout: 20 * time.Millisecond, Limit: 100 * time.Millisecond})
	if reply.Failed()+reply.Unsent != 1000 || reply.Failed() < 1 || reply.Failed() > 6 {
		t.Errorf("%d failed and %d unsent of 1000", reply.Failed(), reply.Unsent)
	}
}

func TestQuietCountsWhatTheReferenceAllows(t *testing.T) {
	p := mustPods(t)
	addresses := ports(serverIP, 8080)
	mustServer(t, p.server, ServeOptions{Connect: addresses, Somaxconn: 1 << 16})
	client, _ := mustClient(t, p.client)

	// No CPU is as fast as that: none counts, and the request ends when its patience does, or its limit.
	reply := mustDo(t, client, Request{Addresses: addresses, Count: 1000, Quiet: 1, Limit: 50 * time.Millisecond})
	if len(reply.Latencies) != 0 || len(reply.Disturbed) == 0 || reply.Failed() != 0 || reply.Elapsed < 50*time.Millisecond {
		t.Errorf("%d connects count, %d do not, errors %v in %s on a CPU that is never quiet; want none that counts, and the whole limit",
			len(reply.Latencies), len(reply.Disturbed), reply.Errors, reply.Elapsed)
	}
	reply = mustDo(t, client, Request{Addresses: addresses, Count: 10000, Quiet: 1, Patience: 20 * time.Millisecond, Limit: 10 * time.Second})
	if reply.Waited < 20*time.Millisecond || reply.Elapsed > 5*time.Second {
		t.Errorf("paused for %s of %s with a patience of 20 ms", reply.Waited, reply.Elapsed)
	}
	// And none is slower than this: all count but the first slice, before which the caches were cold, and the last.
	reply = mustDo(t, client, Request{Addresses: addresses, Count: 1000, Quiet: time.Hour, Limit: 10 * time.Second})
	if len(reply.Latencies) < 1000 || len(reply.Disturbed) == 0 || len(reply.Disturbed) > 500 || reply.Waited != 0 {
		t.Errorf("%d connects count and %d do not on a CPU that is always quiet, with %s of pauses; want 1000 or a slice more, two slices, and none",
			len(reply.Latencies), len(reply.Disturbed), reply.Waited)
	}

	reply = mustDo(t, client, Request{Kind: Calibrate, Addresses: addresses, Count: 100, Limit: time.Second})
	if reply.Quiet < 100*time.Nanosecond || reply.Quiet > time.Millisecond {
		t.Errorf("connects count while 32 calls of getppid take at most %s", reply.Quiet)
	}
	// What is made is kept, whether it counts or not. A server of its own has accepted nothing yet.
	addresses = ports(serverIP, 8081)
	server, _, _ := mustServer(t, p.server, ServeOptions{Connect: addresses, Somaxconn: 1 << 16})
	reply = mustDo(t, client, Request{Addresses: addresses, Count: 200, Quiet: reply.Quiet, Limit: 10 * time.Second})
	made := int64(len(reply.Latencies) + len(reply.Disturbed))
	// How many count is the machine's matter: beside a noisy neighbour none may.
	if made == 0 || reply.Failed() != 0 {
		t.Errorf("%d connects were made, errors %v", made, reply.Errors)
	}
	if report := mustDrain(t, server, made); report.Accepted != made {
		t.Errorf("server accepted %d connections, the client tells of %d", report.Accepted, made)
	}
}

func TestServersNameThemselves(t *testing.T) {
	p := mustPods(t)
	any := netip.MustParseAddrPort("0.0.0.0:0")
	var tcp, udp []netip.AddrPort
	for _, name := range []string{"one", "two"} {
		_, report, _ := mustServer(t, p.server, ServeOptions{Name: name, Identify: []netip.AddrPort{any}, Datagram: []netip.AddrPort{any}})
		tcp = append(tcp, netip.AddrPortFrom(serverIP, report.Identify[0].Port()))
		udp = append(udp, netip.AddrPortFrom(serverIP, report.Datagram[0].Port()))
	}
	client, _ := mustClient(t, p.client)
	want := map[string]int64{"one": 5, "two": 5}
	for kind, addresses := range map[Kind][]netip.AddrPort{Identify: tcp, Datagram: udp} {
		reply := mustDo(t, client, Request{Kind: kind, Addresses: addresses, Count: 10})
		if diff := cmp.Diff(want, reply.Answered); diff != "" || len(reply.Latencies) != 10 {
			t.Errorf("%s: answered (-want +got):\n%s\nerrors %v", kind, diff, reply.Errors)
		}
		reply = mustDo(t, client, Request{Kind: kind, Addresses: ports(serverIP, 9), Count: 1})
		if diff := cmp.Diff(map[string]int64{"ECONNREFUSED": 1}, reply.Errors); diff != "" {
			t.Errorf("%s to a closed port (-want +got):\n%s", kind, diff)
		}
		reply = mustDo(t, client, Request{Kind: kind, Addresses: ports(blackHoleIP, 9), Count: 1, Timeout: 20 * time.Millisecond})
		if diff := cmp.Diff(map[string]int64{"timeout": 1}, reply.Errors); diff != "" {
			t.Errorf("%s to a black hole (-want +got):\n%s", kind, diff)
		}
	}
}

// Lines are exchanged by UDP and on TCP connections, from new sockets and from kept ones, and what is timed one way takes no longer than both.
func TestExchange(t *testing.T) {
	p := mustPods(t)
	any := netip.MustParseAddrPort("0.0.0.0:0")
	_, report, _ := mustServer(t, p.server, ServeOptions{Name: "one", Identify: []netip.AddrPort{any}, Datagram: []netip.AddrPort{any}})
	tcp, udp := ports(serverIP, report.Identify[0].Port()), ports(serverIP, report.Datagram[0].Port())
	client, _ := mustClient(t, p.client)
	for name, request := range map[string]Request{
		"new sockets":     {Addresses: udp},
		"kept sockets":    {Addresses: udp, Kept: true},
		"kept streams":    {Addresses: tcp, Kept: true, Stream: true},
		"kept, one way":   {Addresses: udp, Kept: true, OneWay: true},
		"alone":           {Addresses: udp, Alone: true},
		"stream, one way": {Addresses: tcp, Kept: true, Stream: true, OneWay: true},
	} {
		request.Kind, request.Count, request.Warmup = Exchange, 50, 5
		if reply := mustDo(t, client, request); len(reply.Latencies) != 50 || reply.Failed() != 0 || slices.Min(reply.Latencies) <= 0 {
			t.Errorf("%s: %d latencies, errors %v", name, len(reply.Latencies), reply.Errors)
		}
	}
	reply := mustDo(t, client, Request{Kind: Exchange, Addresses: ports(blackHoleIP, 9), Count: 1, Timeout: 20 * time.Millisecond})
	if diff := cmp.Diff(map[string]int64{"timeout": 1}, reply.Errors); diff != "" {
		t.Errorf("to a black hole (-want +got):\n%s", diff)
	}
	if _, err := client.Do(t.Context(), Request{Kind: Exchange, Addresses: ports(serverIP, 9), Kept: true, Stream: true, Count: 1}); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("stream to a closed port: %v", err)
	}
}

func TestWait(t *testing.T) {
	p := mustPods(t)
	client, _ := mustClient(t, p.client)
	addresses := ports(serverIP, 8080, 8081)
	reply := mustDo(t, client, Request{Kind: Wait, Addresses: addresses, Limit: 50 * time.Millisecond})
	if reply.Unsent != 2 || reply.Errors["ECONNREFUSED"] == 0 {
		t.Errorf("nobody listens, but %d are missing; errors %v", reply.Unsent, reply.Errors)
	}
	request := Request{Kind: Wait, Addresses: addresses, Limit: 20 * time.Second}
	if err := client.Prepare(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	before := time.Now()
	waited := make(chan error, 1)
	go func() { waited <- client.Run(t.Context()) }()
	mustServer(t, p.server, ServeOptions{Connect: addresses})
	if err := <-waited; err != nil {
		t.Fatal(err)
	}
	reply, err := client.Collect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if reply.Unsent != 0 || len(reply.Latencies) != 2 {
		t.Errorf("%d did not answer; errors %v", reply.Unsent, reply.Errors)
	}
	if answered := reply.Began.Add(reply.Elapsed); answered.Before(before) || answered.After(time.Now()) {
		t.Errorf("answered at %s, outside of the time that was waited", answered)
	}
}

// mustNFT loads rules into a namespace.
func mustNFT(tb testing.TB, ns netns.NsHandle, rules string) {
	tb.Helper()
	path, err := exec.LookPath("nft")
	if err != nil {
		tb.Skip(err)
	}
	cmd := exec.Command(path, "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	var output []byte
	err = inNamespace(ns, func() (err error) {
		output, err = cmd.CombinedOutput()
		return err
	})
	if err != nil {
		tb.Fatalf("nft: %v\n%s", err, output)
	}
}

// While a Service is waited for, SYNs to it go out untranslated. None of the connects that come after may meet what connection
// tracking remembers of them.
func TestWaitDoesNotSpoilLaterConnects(t *testing.T) {
	p := mustPods(t)
	service := netip.MustParseAddrPort("203.0.113.1:80")
	// Subtle: the rule that looks at ct is what turns connection tracking on.
	mustNFT(t, p.client, "table ip test { chain output { type nat hook output priority -100; ct state invalid counter; }; }")
	mustRoute(t, p.client, service.Addr(), blackHoleIP)
	// Few enough ports for the connects to take each of them.
	err := inNamespace(p.client, func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40099"), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	backend := ports(serverIP, 8080)
	mustServer(t, p.server, ServeOptions{Connect: backend})
	client, _ := mustClient(t, p.client)
	missing := mustDo(t, client, Request{Kind: Wait, Addresses: []netip.AddrPort{service}, Limit: 300 * time.Millisecond})
	if missing.Errors[timedOut] == 0 || missing.Unsent != 1 {
		t.Fatalf("nothing translates, but waiting saw %v, %d missing", missing.Errors, missing.Unsent)
	}
	mustNFT(t, p.client, fmt.Sprintf("add rule ip test output ip daddr %s tcp dport %d dnat to %s", service.Addr(), service.Port(), backend[0]))
	found := mustDo(t, client, Request{Kind: Wait, Addresses: []netip.AddrPort{service}, Limit: 10 * time.Second})
	if found.Unsent != 0 {
		t.Fatalf("the Service is there, but waiting saw %v", found.Errors)
	}
	reply := mustDo(t, client, Request{Addresses: []netip.AddrPort{service}, Count: 500, Timeout: 50 * time.Millisecond})
	if reply.Failed() != 0 {
		t.Errorf("after %d attempts that were lost, connects failed: %v", missing.Errors[timedOut], reply.Errors)
	}
}

func TestClosedPipesEndChildrenInTheMiddleOfTheirWork(t *testing.T) {
	p := mustPods(t)
	addresses := ports(serverIP, 8080)
	client, clientChild := mustClient(t, p.client)
	server, _, serverChild := mustServer(t, p.server, ServeOptions{Connect: addresses})
	if err := client.Prepare(t.Context(), Request{Addresses: addresses, Count: 1e6, Rate: 100}); err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- client.Run(t.Context()) }()
	mustDrain(t, server, 5) // by now the client is in its loop, with three hours to go
	client.Close()
	if err := <-ran; err == nil {
		t.Error("Run returned without an error though the client did not finish")
	}
	clientChild.mustEnd(t)
	server.Close()
	serverChild.mustEnd(t)
}

func TestDriverIsLostWhenACallIsGivenUp(t *testing.T) {
	p := mustPods(t)
	client, _ := mustClient(t, p.client)
	if err := client.Prepare(t.Context(), Request{Addresses: ports(blackHoleIP, 1), Count: 1e6, Timeout: 20 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := client.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Run under an ended context: %v", err)
	}
	if _, err := client.Collect(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Collect after a call that was given up: %v", err)
	}
}

func TestWrongRequestsAreRefused(t *testing.T) {
	client, _ := mustClient(t, mustNamespace(t))
	address := ports(serverIP, 80)
	for name, request := range map[string]Request{
		"no addresses":               {Count: 1},
		"no port":                    {Addresses: ports(serverIP, 0), Count: 1},
		"negative count":             {Addresses: address, Count: -1},
		"unknown kind":               {Kind: "dance", Addresses: address},
		"wait without limit":         {Kind: Wait, Addresses: address},
		"quiet without limit":        {Addresses: address, Count: 1, Quiet: time.Second},
		"calibrate without limit":    {Kind: Calibrate, Addresses: address, Count: 1},
		"calibrate without count":    {Kind: Calibrate, Addresses: address, Limit: time.Second},
		"calibrate without connects": {Kind: Calibrate, Addresses: address, Count: 1, Limit: time.Millisecond},
		"kept connects":              {Addresses: address, Count: 1, Kept: true},
		"wait alone":                 {Kind: Wait, Addresses: address, Limit: time.Second, Alone: true},
		"stream that is not kept":    {Kind: Exchange, Addresses: address, Count: 1, Stream: true},
		"rate for a datagram":        {Kind: Datagram, Addresses: address, Count: 1, Rate: 1},
	} {
		if _, err := client.Do(t.Context(), request); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := client.Collect(t.Context()); err == nil {
		t.Error("Collect without Run: no error")
	}
	// The client is still at work.
	if reply := mustDo(t, client, Request{Addresses: address, Count: 1}); reply.Errors["ENETUNREACH"] != 1 {
		t.Errorf("errors %v, want one ENETUNREACH", reply.Errors)
	}
}

// A client that the scheduler holds up for longer than the server waits must not see its connect fail: the server says
// goodbye by FIN, not by RST.
func TestServerNeverResets(t *testing.T) {
	p := mustPods(t)
	_, report, _ := mustServer(t, p.client, ServeOptions{Connect: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}})
	err := inNamespace(p.client, func() error {
		c, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(report.Connect[0]))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Read(make([]byte, 1))
		return err
	})
	if err != io.EOF {
		t.Errorf("reading from a server that closed: %v, want EOF", err)
	}
}

func TestServeFailsOnAnAddressThatItDoesNotHave(t *testing.T) {
	options := ServeOptions{Connect: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.1:8080")}}
	if err := Serve(t.Context(), options, strings.NewReader(""), io.Discard); !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Errorf("got %v, want EADDRNOTAVAIL", err)
	}
}

func BenchmarkConnect(b *testing.B) {
	p := mustPods(b)
	addresses := ports(serverIP, 8080)
	mustServer(b, p.server, ServeOptions{Connect: addresses, Somaxconn: 1 << 16})
	client, _ := mustClient(b, p.client)
	b.ResetTimer()
	reply := mustDo(b, client, Request{Addresses: addresses, Count: b.N, Warmup: 500})
	s := Summarize(reply.Latencies)
	b.ReportMetric(float64(s.P50), "p50-ns")
	b.ReportMetric(float64(s.P99), "p99-ns")
	b.ReportMetric(float64(reply.CPU)/float64(b.N), "client-cpu-ns/op")
}

func BenchmarkPacedConnect(b *testing.B) {
	p := mustPods(b)
	addresses := ports(serverIP, 8080)
	mustServer(b, p.server, ServeOptions{Connect: addresses})
	client, _ := mustClient(b, p.client)
	b.ResetTimer()
	reply := mustDo(b, client, Request{Addresses: addresses, Count: b.N, Warmup: 500, Rate: 1000})
	b.ReportMetric(float64(Summarize(reply.Latencies).P50), "p50-ns")
	b.ReportMetric(float64(reply.CPU)/float64(b.N), "client-cpu-ns/op")
}
