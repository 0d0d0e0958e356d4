// SPDX-License-Identifier: Apache-2.0

package dataplane_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/scenarios/load"
)

const (
	// ruleRounds is how often every chain is measured. The 6th and the 15th of 20 ordered values enclose their median with
	// 95.9 % (binomial).
	ruleRounds        = 20
	lowRank, highRank = 6, 15
	connectsARound    = 150
	enoughConnects    = 50
	attempts          = 6
	attemptLimit      = time.Second
	rulesPort         = 8080
	rulesProgram      = "PLIMSOLL_RULES_PROGRAM" // by which this binary, run again as a child, learns what it is
	soGetInfo         = 64                       // IPT_SO_GET_INFO, include/uapi/linux/netfilter_ipv4/ip_tables.h
	serviceChain      = "KUBE-SVC-%016d"
	sysctlForward     = "/proc/sys/net/ipv4/ip_forward"
	cacheFiles        = "/sys/devices/system/cpu/cpu0/cache/index*"
	clientRole        = "client"
)

// rulesShape is a rule that the first packet of a connection meets and does not match.
//
// In ip_packet_match (net/ipv4/netfilter/ip_tables.c) the address is compared before anything else, so a packet that misses by
// its address never comes to a rule's matches: x_tables runs the same instructions for all shapes, and they differ by nothing
// but how far it is to the next rule. nf_tables runs the shape's expressions in the order in which iptables wrote them, and
// kube-proxy's rule begins with the protocol.
type rulesShape struct {
	name string
	rule func(i int, destination netip.Addr) string
}

var rulesShapes = []rulesShape{
	// As kube-proxy writes it into KUBE-SERVICES.
	{"kube-proxy", func(i int, d netip.Addr) string {
		return fmt.Sprintf(`-d %s/32 -p tcp -m comment --comment "plimsoll/s-%d cluster IP" -m tcp --dport 80 -j `+serviceChain, d, i, i)
	}},
	// A comment more, which no packet comes to either: only the distance grows.
	{"two-comments", func(i int, d netip.Addr) string {
		return fmt.Sprintf(`-d %s/32 -p tcp -m comment --comment "plimsoll/s-%d cluster IP" -m comment --comment "again" -m tcp --dport 80 -j `+serviceChain, d, i, i)
	}},
	{"no-comment", func(i int, d netip.Addr) string {
		return fmt.Sprintf("-d %s/32 -p tcp -m tcp --dport 80 -j "+serviceChain, d, i)
	}},
	{"bare", func(_ int, d netip.Addr) string { return fmt.Sprintf("-d %s/32 -j RETURN", d) }},
}

// rulesLadder begins with the floor: a chain without rules. On CPUs with 32 KB of first-level and 1 MB of second-level cache, 100
// rules are about as many as fit the first, 1,000 fit the second, and of 5,000 some shapes do.
var rulesLadder = []int{0, 100, 1_000, 5_000, 20_000}

// BenchmarkIPTablesRule times connect(2) through chains of rules that do not match, and reports what one rule costs: the median
// over rounds of (p50 with N rules − p50 without) / N, with an interval of 95 %. A round connects through every shape and every
// N in random order, by way of a node of its own for each, from one client to one server. bytes/rule is from the kernel. The
// interval is of one set of nodes and one place in memory: run the command again for another.
func BenchmarkIPTablesRule(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	// Subtle: all chains are measured before the first line is printed, and -count repeats the lines alone: the same figures
	// again, which would pass for repeats without any spread.
	if count := flag.Lookup("test.count").Value.String(); count != "1" {
		b.Fatalf("-count %s would print one measurement so many times: run the command again instead", count)
	}
	for _, line := range cacheSizes(b) {
		b.Log(line)
	}
	for _, backend := range []string{"legacy", "nft"} {
		b.Run("backend="+backend, func(b *testing.B) {
			command, err := exec.LookPath("xtables-" + backend + "-multi")
			if err != nil {
				b.Skip(err)
			}
			if command, err = filepath.Abs(command); err != nil {
				b.Fatal(err)
			}
			chains := mustBuildChains(b, command)
			measureChains(b, chains)
			for _, c := range chains {
				mustHaveWalked(b, command, c)
			}
			for i, c := range chains {
				floor := chains[i-i%len(rulesLadder)]
				b.Run(fmt.Sprintf("shape=%s/rules=%d", c.shape.name, c.rules), func(b *testing.B) {
					b.ReportMetric(0, "ns/op") // an operation would be a round of all chains
					b.ReportMetric(middle(c.p50), "p50-ns")
					if c.rules == 0 {
						return
					}
					perRule := make([]float64, ruleRounds)
					for r := range perRule {
						perRule[r] = (c.p50[r] - floor.p50[r]) / float64(c.rules)
					}
					slices.Sort(perRule)
					b.ReportMetric(middle(perRule), "ns/rule")
					b.ReportMetric(perRule[lowRank-1], "low-ns/rule")
					b.ReportMetric(perRule[highRank-1], "high-ns/rule")
					if c.bytes > 0 {
						b.ReportMetric(float64(c.bytes)/float64(c.rules), "bytes/rule")
					}
				})
			}
		})
	}
}

// rulesChain is a node whose nat PREROUTING jumps to a chain of rules, with a way from the client to the server through it.
type rulesChain struct {
	shape rulesShape
	rules int
	// bytes is by how much the rules, without the chains that they jump to, made the table grow; 0 where the kernel does not
	// say.
	bytes    int
	node     *clusters.NetNS
	target   netip.AddrPort // of the server, through this node
	connects int            // that were made through the chain
	p50      []float64      // ns, by round
	// The ends' programs are the same for all chains, so that none is luckier with their memory.
	client *load.Driver
	server *load.Server
}

// mustBuildChains makes a node for each shape and N, all between one client and one server.
func mustBuildChains(b *testing.B, command string) []*rulesChain {
	b.Helper()
	client, server := mustNetNS(b), mustNetNS(b)
	lock := filepath.Join(b.TempDir(), "xtables.lock")
	var chains []*rulesChain
	for _, shape := range rulesShapes {
		for _, n := range rulesLadder {
			node := mustNetNS(b)
			c := &rulesChain{shape: shape, rules: n, node: node}
			// 198.18.k.0/24 is node k's: the client's link has .1 and .2, the server's .5 and .6.
			k := byte(len(chains))
			at := func(host byte) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, k, host}) }
			mustLink(b, node, at(1), client, at(2), netip.PrefixFrom(at(4), 30))
			mustLink(b, node, at(5), server, at(6), netip.PrefixFrom(at(0), 30))
			c.target = netip.AddrPortFrom(at(6), rulesPort)
			if err := node.Do(func() (err error) {
				if err := os.WriteFile(sysctlForward, []byte("1"), 0); err != nil {
					return err
				}
				c.bytes, err = loadRules(b.Context(), command, lock, shape, n)
				return err
			}); err != nil {
				b.Fatal(err)
			}
			chains = append(chains, c)
		}
	}
	options, err := json.Marshal(load.ServeOptions{Connect: []netip.AddrPort{netip.AddrPortFrom(netip.IPv4Unspecified(), rulesPort)}, Somaxconn: 4096})
	if err != nil {
		b.Fatal(err)
	}
	stdin, stdout := mustStartProgram(b, server, string(options))
	serve := load.NewServer(stdin, stdout)
	if _, err := serve.Ready(b.Context()); err != nil {
		b.Fatal(err)
	}
	stdin, stdout = mustStartProgram(b, client, clientRole)
	driver := load.NewDriver(stdin, stdout)
	for _, c := range chains {
		c.client, c.server = driver, serve
	}
	return chains
}

// loadRules fills the nat table of this thread's network namespace: first the chains, then the rules. It returns the bytes that
// the rules took in the kernel, 0 if that is not an x_tables table.
func loadRules(ctx context.Context, command, lock string, shape rulesShape, n int) (bytes int, err error) {
	var chains, rules strings.Builder
	chains.WriteString("*nat\n:KUBE-SERVICES - [0:0]\n")
	rules.WriteString("*nat\n")
	for i := range n {
		fmt.Fprintf(&chains, ":"+serviceChain+" - [0:0]\n", i)
		destination := netip.AddrFrom4([4]byte{198, 19, byte(i >> 8), byte(i)})
		fmt.Fprintf(&rules, "-A KUBE-SERVICES %s\n", shape.rule(i, destination))
	}
	// Subtle: without a rule that translates there is no connection tracking, and without that no packet comes to the nat table.
	chains.WriteString("-A POSTROUTING -d 198.19.255.255/32 -j MASQUERADE\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n")
	rules.WriteString("COMMIT\n")
	legacy := strings.Contains(filepath.Base(command), "legacy")
	var sizes [2]int
	for i, content := range []string{chains.String(), rules.String()} {
		cmd := exec.CommandContext(ctx, command, "iptables-restore", "--noflush")
		cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE="+lock)
		cmd.Stdin = strings.NewReader(content)
		if out, err := cmd.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("%s, %d rules: %w: %s", shape.name, n, err, out)
		}
		if !legacy {
			continue
		}
		if sizes[i], err = natTableSize(); err != nil {
			return 0, err
		}
	}
	return sizes[1] - sizes[0], nil
}

// natTableSize is the size of the x_tables nat table in this thread's network namespace, as iptables-legacy itself asks for it.
func natTableSize() (int, error) {
	// struct ipt_getinfo, include/uapi/linux/netfilter_ipv4/ip_tables.h.
	var info struct {
		name        [32]byte
		validHooks  uint32
		hookEntries [5]uint32
		underflows  [5]uint32
		entries     uint32
		size        uint32
	}
	copy(info.name[:], "nat")
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return 0, fmt.Errorf("open a raw socket: %w", err)
	}
	defer unix.Close(socket)
	length := uint32(unsafe.Sizeof(info))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), unix.IPPROTO_IP, soGetInfo,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&length)), 0); errno != 0 {
		return 0, fmt.Errorf("ask for the nat table's size: %w", errno)
	}
	return int(info.size), nil
}

// measureChains connects through all chains in each round.
func measureChains(b *testing.B, chains []*rulesChain) {
	b.Helper()
	rng := rand.New(rand.NewPCG(1, uint64(len(chains))))
	calibrated, err := chains[0].client.Do(b.Context(), load.Request{
		Kind: load.Calibrate, Addresses: []netip.AddrPort{chains[0].target}, Count: connectsARound, Warmup: connectsARound, Limit: attemptLimit,
	})
	if err != nil {
		b.Fatal(err)
	}
	for range ruleRounds {
		for _, i := range rng.Perm(len(chains)) {
			c := chains[i]
			for attempt := 1; ; attempt++ {
				reply, err := c.client.Do(b.Context(), load.Request{
					Addresses: []netip.AddrPort{c.target}, Count: connectsARound, Warmup: connectsARound / 10, Quiet: calibrated.Quiet,
					Limit: attemptLimit,
				})
				if err != nil {
					b.Fatal(err)
				}
				if reply.Failed() > 0 {
					b.Fatalf("%s, %d rules: connects failed: %v", c.shape.name, c.rules, reply.Errors)
				}
				c.connects += len(reply.Latencies) + len(reply.Disturbed)
				if len(reply.Latencies) >= enoughConnects {
					c.p50 = append(c.p50, float64(load.Summarize(reply.Latencies).P50))
					break
				}
				if attempt == attempts {
					b.Fatalf("%s, %d rules: the CPU keeps no speed: %d of %d connects count", c.shape.name, c.rules,
						len(reply.Latencies), len(reply.Latencies)+len(reply.Disturbed))
				}
			}
		}
	}
	report, err := chains[0].server.Report(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	if report.Overflows > 0 {
		b.Fatalf("%d connections found the accept queue full", report.Overflows)
	}
}

// mustHaveWalked ends the benchmark unless the chain was entered for every connect.
func mustHaveWalked(b *testing.B, command string, c *rulesChain) {
	b.Helper()
	var out []byte
	err := c.node.Do(func() (err error) {
		cmd := exec.CommandContext(b.Context(), command, "iptables", "-t", "nat", "-v", "-S", "PREROUTING")
		cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE="+os.DevNull)
		out, err = cmd.CombinedOutput()
		return err
	})
	if err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	_, counters, _ := strings.Cut(string(out), "-A PREROUTING -c ")
	var packets int
	if _, err := fmt.Sscan(counters, &packets); err != nil || packets < c.connects {
		b.Fatalf("%s, %d rules: of %d connects %d entered the chain: %v: %s", c.shape.name, c.rules, c.connects, packets, err, out)
	}
}

// mustNetNS returns a network namespace that is gone with the benchmark.
func mustNetNS(b *testing.B) *clusters.NetNS {
	b.Helper()
	ns, err := clusters.NewNetNS()
	if errors.Is(err, unix.EPERM) {
		b.Skip(err)
	} else if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { ns.Close() })
	return ns
}

// mustLink lays a veth pair between a node and a pod, with the address that each has on it, and has the pod reach a range through
// the node. Link addresses are set for good, as in the lab.
func mustLink(b *testing.B, node *clusters.NetNS, nodeIP netip.Addr, pod *clusters.NetNS, podIP netip.Addr, through netip.Prefix) {
	b.Helper()
	mustOpen := func(ns *clusters.NetNS) *netlink.Handle {
		h, err := ns.Netlink()
		if err != nil {
			b.Fatal(err)
		}
		return h
	}
	outside, inside := mustOpen(node), mustOpen(pod)
	defer outside.Close()
	defer inside.Close()
	// A link is named for its own address, which no other link of the namespace has.
	name := func(ip netip.Addr) string { return "v" + strings.ReplaceAll(ip.String(), ".", "-") }
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name(nodeIP)
	if err := outside.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name(podIP), PeerNamespace: netlink.NsFd(pod.Fd())}); errors.Is(err, unix.EOPNOTSUPP) {
		b.Skip("this kernel has no veth")
	} else if err != nil {
		b.Fatal(err)
	}
	ends := []struct {
		handle *netlink.Handle
		own    netip.Addr
		link   netlink.Link
	}{{handle: outside, own: nodeIP}, {handle: inside, own: podIP}}
	for i := range ends {
		e := &ends[i]
		var err error
		if e.link, err = e.handle.LinkByName(name(e.own)); err != nil {
			b.Fatal(err)
		}
		if err := e.handle.AddrAdd(e.link, &netlink.Addr{IPNet: &net.IPNet{IP: e.own.AsSlice(), Mask: net.CIDRMask(30, 32)}}); err != nil {
			b.Fatal(err)
		}
		if err := e.handle.LinkSetUp(e.link); err != nil {
			b.Fatal(err)
		}
	}
	for i, e := range ends {
		peer := ends[1-i]
		if err := e.handle.NeighSet(&netlink.Neigh{LinkIndex: e.link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: peer.own.AsSlice(),
			HardwareAddr: peer.link.Attrs().HardwareAddr}); err != nil {
			b.Fatal(err)
		}
	}
	if err := inside.RouteAdd(&netlink.Route{LinkIndex: ends[1].link.Attrs().Index, Gw: nodeIP.AsSlice(),
		Dst: &net.IPNet{IP: through.Addr().AsSlice(), Mask: net.CIDRMask(through.Bits(), 32)}}); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkRuleWalk walks memory that is laid out like an x_tables chain, and nothing else: of each rule it reads what
// ip_packet_match reads before it gives up, and where the next rule lies. With order=chain the next rule is where this one says
// (next_offset), so that no rule can be looked at before the one before it has arrived, which is how ipt_do_table goes on; with
// order=known the distance is known beforehand. The difference is what waiting costs. Pages of 4 KB against 2 MB show what the TLB costs.
func BenchmarkRuleWalk(b *testing.B) {
	for _, line := range cacheSizes(b) {
		b.Log(line)
	}
	for _, bytes := range []int{152, 200, 488, 776} {
		for _, n := range rulesLadder[1:] {
			for _, pages := range []string{"4K", "2M"} {
				for _, order := range []string{"chain", "known"} {
					b.Run(fmt.Sprintf("bytes=%d/rules=%d/pages=%s/order=%s", bytes, n, pages, order), func(b *testing.B) {
						memory := mustLayOut(b, n, bytes, pages == "2M")
						var walks []float64
						for b.Loop() {
							began := time.Now()
							var matched int
							if order == "chain" {
								matched = walkChain(memory)
							} else {
								matched = walkKnown(memory, bytes)
							}
							walks = append(walks, float64(time.Since(began)))
							if matched != 0 {
								b.Fatalf("%d rules match", matched)
							}
						}
						b.ReportMetric(0, "ns/op")
						b.ReportMetric(middle(walks)/float64(n), "ns/rule")
					})
				}
			}
		}
	}
}

// Where the fields of a struct ipt_entry lie (include/uapi/linux/netfilter_ipv4/ip_tables.h).
const (
	entryDestination = 4
	entryMask        = 12
	entryInvert      = 83
	entryNext        = 90
)

// mustLayOut returns n rules of so many bytes, none of which is for the address 0. It skips the benchmark when the kernel gives no
// huge pages.
func mustLayOut(b *testing.B, n, bytes int, huge bool) []byte {
	b.Helper()
	const hugePage = 2 << 20
	size := (n*bytes + hugePage - 1) / hugePage * hugePage
	mapped, err := unix.Mmap(-1, 0, size+hugePage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unix.Munmap(mapped) })
	advice := unix.MADV_NOHUGEPAGE
	if huge {
		advice = unix.MADV_HUGEPAGE
	}
	if err := unix.Madvise(mapped, advice); err != nil {
		b.Skipf("this kernel has no transparent huge pages: %v", err)
	}
	before := hugeBytes(b)
	// A huge page begins at a multiple of its size.
	begin := -int(uintptr(unsafe.Pointer(&mapped[0]))) & (hugePage - 1)
	memory := mapped[begin : begin+n*bytes]
	for i := range n {
		rule := memory[i*bytes:]
		binary.NativeEndian.PutUint32(rule[entryDestination:], uint32(i+1))
		binary.NativeEndian.PutUint32(rule[entryMask:], ^uint32(0))
		binary.NativeEndian.PutUint16(rule[entryNext:], uint16(bytes))
	}
	if got := hugeBytes(b) - before; huge && got < size {
		b.Skipf("of %d bytes %d came in huge pages", size, got)
	}
	return memory
}

// hugeBytes is how much of this process lies in transparent huge pages.
func hugeBytes(b *testing.B) int {
	b.Helper()
	content, err := os.ReadFile("/proc/self/smaps_rollup")
	if err != nil {
		b.Fatal(err)
	}
	_, after, _ := strings.Cut(string(content), "AnonHugePages:")
	var kilobytes int
	if _, err := fmt.Sscan(after, &kilobytes); err != nil {
		b.Fatalf("no AnonHugePages in smaps_rollup: %v", err)
	}
	return kilobytes << 10
}

// misses compares as ip_packet_match does.
func misses(rule unsafe.Pointer, address uint32) bool {
	return (address&*(*uint32)(unsafe.Add(rule, entryMask)) != *(*uint32)(unsafe.Add(rule, entryDestination))) !=
		(*(*uint8)(unsafe.Add(rule, entryInvert)) != 0)
}

func walkChain(memory []byte) (matched int) {
	rules := unsafe.Pointer(&memory[0])
	for at := 0; at < len(memory); {
		rule := unsafe.Add(rules, at)
		if !misses(rule, 0) {
			matched++
		}
		at += int(*(*uint16)(unsafe.Add(rule, entryNext)))
	}
	return matched
}

func walkKnown(memory []byte, bytes int) (matched int) {
	rules := unsafe.Pointer(&memory[0])
	for at := 0; at < len(memory); at += bytes {
		if !misses(unsafe.Add(rules, at), 0) {
			matched++
		}
	}
	return matched
}

// TestMain makes this binary the client's and the server's program as well.
func TestMain(m *testing.M) {
	role := os.Getenv(rulesProgram)
	var err error
	switch role {
	case "":
		os.Exit(m.Run())
	case clientRole:
		err = load.Client(context.Background(), os.Stdin, os.Stdout)
	default:
		var options load.ServeOptions
		if err = json.Unmarshal([]byte(role), &options); err == nil {
			err = load.Serve(context.Background(), options, os.Stdin, os.Stdout)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// mustStartProgram runs this binary in a namespace until the benchmark is over, and returns its pipes.
func mustStartProgram(b *testing.B, ns *clusters.NetNS, role string) (io.WriteCloser, io.Reader) {
	b.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), rulesProgram+"="+role)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := ns.Do(cmd.Start); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		stdin.Close() // upon which it ends
		if err := cmd.Wait(); err != nil {
			b.Errorf("%s: %v", role, err)
		}
	})
	return stdin, stdout
}

// middle is the median.
func middle(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

// cacheSizes says what caches a CPU has, one a line.
func cacheSizes(b *testing.B) (lines []string) {
	b.Helper()
	indexes, err := filepath.Glob(cacheFiles)
	if err != nil {
		b.Fatal(err)
	}
	for _, index := range indexes {
		fields := []string{"cache"}
		for _, name := range []string{"level", "type", "size"} {
			content, err := os.ReadFile(filepath.Join(index, name))
			if err != nil {
				b.Fatal(err)
			}
			fields = append(fields, strings.TrimSpace(string(content)))
		}
		lines = append(lines, strings.Join(fields, " "))
	}
	return lines
}
