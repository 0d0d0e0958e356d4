// SPDX-License-Identifier: Apache-2.0

package lb_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
	"github.com/plimsoll-bench/plimsoll/results"
	"golang.org/x/sys/unix"
)

// sinks are where backends of benchmarks listen.
var sinks = []string{"127.0.0.1:8080", "127.0.0.2:8080"}

// mustSinks starts a pod that listens there.
func mustSinks(b *testing.B) *lbtest.Pod {
	b.Helper()
	pod := lbtest.StartPod(b)
	mustSink(b, pod)
	return pod
}

func mustSink(b *testing.B, pod *lbtest.Pod) {
	b.Helper()
	for _, address := range sinks {
		pod.Sink(b, address)
	}
}

// mustCarry has a pod's connects translated to so many Services, whose backends are the sinks.
func mustCarry(b *testing.B, pod *lbtest.Pod, options lb.Options, services int) ([]lb.Change, *rand.Rand) {
	b.Helper()
	changes := manyChanges(services)
	mustSync(b, mustLoad(b, pod, options), changes...)
	return changes, rand.New(rand.NewPCG(1, uint64(services)))
}

// A stay is a pod that goes to and fro between two cgroups, one with programs and one without, so that all else is the same: namespace, ports,
// process. Two pods differ by more than the programs cost.
type stay struct {
	*lbtest.Pod
	plain, translated string
}

// mustStay starts a pod that is in the cgroup for programs.
func mustStay(b *testing.B) stay {
	b.Helper()
	translated := lbtest.NewCgroup(b) // before the pod, since it must outlive it
	pod := lbtest.StartPod(b)
	s := stay{pod, pod.Cgroup, translated}
	pod.MoveTo(b, translated)
	return s
}

// compare times blocks of two kinds in nanoseconds, direct in the cgroup without programs and mode in the other one. An operation is a block
// of each, in random order. Reported are the medians, and of the neighbouring blocks' differences and ratios the median, with the ratio's 95 %
// interval.
func (s stay) compare(b *testing.B, direct, mode func() []int64) {
	b.Helper()
	order := rand.New(rand.NewPCG(1, 1))
	cgroups, blocks := [2]string{s.plain, s.translated}, [2]func() []int64{direct, mode}
	var times [2][]float64
	for b.Loop() {
		for _, i := range order.Perm(2) {
			s.MoveTo(b, cgroups[i])
			times[i] = append(times[i], float64(median(blocks[i]())))
		}
	}
	var added, ratios []float64
	for i, d := range times[0] {
		added, ratios = append(added, times[1][i]-d), append(ratios, times[1][i]/d)
	}
	slices.Sort(ratios)
	low, high := medianInterval(ratios)
	b.ReportMetric(median(times[0]), "direct-ns")
	b.ReportMetric(median(times[1]), "mode-ns")
	b.ReportMetric(median(added), "added-ns")
	b.ReportMetric(median(ratios), "ratio")
	b.ReportMetric(low, "ratio-lower")
	b.ReportMetric(high, "ratio-upper")
}

// BenchmarkConnect times connect(2) over loopback with a cgroup's programs and without, in blocks of 150: to random Services, with names for
// getpeername(2) and without; to what is no Service ("to=other"); and to this with a program that does nothing ("empty") and
// without any ("nothing"), which are the floors of all hooks and of the measurement. "whole" is from socket(2) to close(2), where
// names cost something, too.
func BenchmarkConnect(b *testing.B) {
	const block = 150
	type timer func(*lbtest.Pod, testing.TB, int, []string) []int64
	connects, sockets := timer((*lbtest.Pod).ConnectTimes), timer((*lbtest.Pod).SocketTimes)
	mustSinkStay := func(b *testing.B) stay {
		s := mustStay(b)
		mustSink(b, s.Pod)
		return s
	}
	other := func(b *testing.B, s stay, times timer) func() []int64 {
		return func() []int64 { return times(s.Pod, b, block, sinks) }
	}
	b.Run("nothing", func(b *testing.B) {
		s := mustSinkStay(b)
		s.compare(b, other(b, s, connects), other(b, s, connects))
	})
	b.Run("empty", func(b *testing.B) {
		s := mustSinkStay(b)
		mustAttachEmpty(b, s.Cgroup)
		s.compare(b, other(b, s, connects), other(b, s, connects))
	})
	for _, options := range []lb.Options{{}, {PeerNames: true}} {
		for _, of := range []struct {
			services int
			suffix   string
			times    timer
		}{{1, "", connects}, {50_000, "", connects}, {1, "/whole", sockets}} {
			name := fmt.Sprintf("peer-names=%t/services=%d/to=", options.PeerNames, of.services)
			b.Run(name+"service"+of.suffix, func(b *testing.B) {
				s := mustSinkStay(b)
				changes, random := mustCarry(b, s.Pod, options, of.services)
				s.compare(b, other(b, s, of.times), func() []int64 { return of.times(s.Pod, b, block, randomTargets(random, changes, block)) })
			})
			b.Run(name+"other"+of.suffix, func(b *testing.B) {
				s := mustSinkStay(b)
				mustCarry(b, s.Pod, options, of.services)
				s.compare(b, other(b, s, of.times), other(b, s, of.times))
			})
		}
	}
}

// BenchmarkRoundTrip times a question and its answer over loopback in blocks of 500, through a Service and directly: on an unconnected UDP
// socket, on a connected one and on a TCP connection that is kept.
func BenchmarkRoundTrip(b *testing.B) {
	const block = 500
	for _, trip := range []lbtest.Trip{lbtest.Datagram, lbtest.Connected, lbtest.Stream} {
		b.Run(string(trip), func(b *testing.B) {
			s := mustStay(b)
			s.Echo(b, sinks[0])
			mustSync(b, mustLoad(b, s.Pod, lb.Options{}), to(udp(vip), sinks[0]), to(tcp(vip), sinks[0]))
			s.compare(b, func() []int64 { return s.RoundTripTimes(b, trip, sinks[0], block) }, func() []int64 { return s.RoundTripTimes(b, trip, vip, block) })
		})
	}
}

// hookSizes are the numbers of Services of BenchmarkHook. The slope leaves out the first: one Service that is connected to over and over stays
// in the CPU's nearest cache, which says nothing of more Services.
var hookSizes = []int{1, 100, 1_000, 10_000, 20_000, 50_000}

// BenchmarkHook times the hook on connect(2) per call, in nanoseconds as the kernel counts them (BPF_STATS_RUN_TIME), for connects to random ones
// of so many Services, against an empty program on the same hook of another pod. All numbers of Services are loaded side by side, each in a pod
// of its own, since a machine's speed drifts: a block of 500 connects to one follows a block through the empty program, and
// an operation of "slope" is such a pair of each number, in random order. It reports what each Service adds to the time above the
// empty program, by a straight line over 100 to 50,000 Services, and the ends of that slope's 95 % interval. Then
// "services=N" report the medians of the same blocks at N Services, so they do not run without "slope", and "line" those of a program that does
// nothing but read a random one of 65,536 cache lines in 8 MiB, as large as the table is: what any look-up among as many Services takes here.
func BenchmarkHook(b *testing.B) {
	const block = 500
	statistics, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		b.Skipf("skipped: %v", err)
	}
	defer statistics.Close()
	plain := mustSinks(b)
	mustAttachEmpty(b, plain.Cgroup)
	empty := mustProgram(b, plain.Cgroup)
	hooks := make([]func(*testing.B) float64, len(hookSizes)+1) // each times a block; the last is the line's
	for i, services := range hookSizes {
		pod := mustSinks(b)
		changes, random := mustCarry(b, pod, lb.Options{}, services)
		program := mustProgram(b, pod.Cgroup)
		hooks[i] = func(b *testing.B) float64 {
			targets := randomTargets(random, changes, block)
			return perCall(b, program, func() { pod.ConnectTimes(b, block, targets) })
		}
	}

	reader := mustSinks(b)
	mustAttachReader(b, reader.Cgroup)
	line := mustProgram(b, reader.Cgroup)
	hooks[len(hookSizes)] = func(b *testing.B) float64 {
		return perCall(b, line, func() { reader.ConnectTimes(b, block, sinks) })
	}

	// One for each -count, as all lines of a benchmark come before those of the next.
	type run struct{ floor, mode [][]float64 } // by size, then by round
	var runs []run
	b.Run("slope", func(b *testing.B) {
		r := run{make([][]float64, len(hooks)), make([][]float64, len(hooks))}
		order := rand.New(rand.NewPCG(1, 1))
		for b.Loop() {
			for _, i := range order.Perm(len(hooks)) {
				r.floor[i] = append(r.floor[i], perCall(b, empty, func() { plain.ConnectTimes(b, block, sinks) }))
				r.mode[i] = append(r.mode[i], hooks[i](b))
			}
		}
		runs = append(runs, r)
		slope, low, high := results.Slope(hookSizes[1:], r.mode[1:len(hookSizes)], r.floor[1:len(hookSizes)], 1)
		b.ReportMetric(slope, "slope-ns/service")
		b.ReportMetric(low, "slope-lower-ns/service")
		b.ReportMetric(high, "slope-upper-ns/service")
	})
	for i := range hooks {
		name := "line"
		if i < len(hookSizes) {
			name = fmt.Sprintf("services=%d", hookSizes[i])
		}
		next := 0
		b.Run(name, func(b *testing.B) {
			if next == len(runs) {
				b.Skip("skipped: its blocks are those of Hook/slope, which was not asked for")
			}
			r := runs[next]
			next++
			for b.Loop() { // nothing is left to do
			}
			var above []float64
			for round, hook := range r.mode[i] {
				above = append(above, hook-r.floor[i][round])
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(median(r.mode[i]), "hook-ns/call")
			b.ReportMetric(median(above), "above-empty-ns/call")
		})
	}
}

// mustAttachEmpty puts a program that does nothing where the load balancer's would be.
func mustAttachEmpty(b *testing.B, cgroup string) {
	b.Helper()
	mustAttach(b, cgroup, asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()})
}

// mustAttachReader puts one there that reads every second line of 8 MiB, at random.
func mustAttachReader(b *testing.B, cgroup string) {
	b.Helper()
	lines, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 64, MaxEntries: 1 << 17, Flags: unix.BPF_F_MMAPABLE})
	if err != nil {
		b.Skipf("skipped: %v", err)
	}
	defer lines.Close()
	mustAttach(b, cgroup, asm.Instructions{
		asm.FnGetPrandomU32.Call(),
		asm.And.Imm(asm.R0, 1<<16-1),
		asm.LSh.Imm(asm.R0, 1),
		asm.StoreMem(asm.RFP, -4, asm.R0, asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, lines.FD()),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "end"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		// Subtle: the answer depends on what was read, as the program's time does then.
		asm.JNE.Imm(asm.R1, 0, "end"),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("end"),
		asm.Return(),
	})
}

func mustAttach(b *testing.B, cgroup string, instructions asm.Instructions) {
	b.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "Dual BSD/GPL", Instructions: instructions,
	})
	if err != nil {
		b.Skipf("skipped: %v", err)
	}
	defer program.Close()
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupInet4Connect, Program: program})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
}

// mustProgram opens the program that is attached to a cgroup's connect hook.
func mustProgram(b *testing.B, cgroup string) *ebpf.Program {
	b.Helper()
	attached := lbtest.Attached(b, cgroup)
	if len(attached) != 1 {
		b.Fatalf("want one program on %s, got %+v", cgroup, attached)
	}
	program, err := ebpf.NewProgramFromID(attached[0].ID)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { program.Close() })
	return program
}

// perCall is how many nanoseconds a call of the program took while do ran.
func perCall(b *testing.B, program *ebpf.Program, do func()) float64 {
	b.Helper()
	read := func() *ebpf.ProgramStats {
		s, err := program.Stats()
		if err != nil {
			b.Fatal(err)
		}
		return s
	}
	before := read()
	do()
	after := read()
	return float64(after.Runtime-before.Runtime) / float64(after.RunCount-before.RunCount)
}

// randomTargets are the addresses of n random frontends of changes.
func randomTargets(random *rand.Rand, changes []lb.Change, n int) []string {
	targets := make([]string, n)
	for i := range targets {
		targets[i] = changes[random.IntN(len(changes))].Frontend.Address.String()
	}
	return targets
}

// BenchmarkSync times publishing frontends with two backends, and changing one of many.
func BenchmarkSync(b *testing.B) {
	for _, services := range []int{1, 20_000} {
		b.Run(fmt.Sprintf("publish=%d", services), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				balancer, changes := mustLoadDetached(b), manyChanges(services)
				b.StartTimer()
				mustSync(b, balancer, changes...)
				b.StopTimer()
				if err := balancer.Close(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
	for _, services := range []int{1, 20_000} {
		b.Run(fmt.Sprintf("change=1/of=%d", services), func(b *testing.B) {
			balancer, changes := mustLoadDetached(b), manyChanges(services)
			defer balancer.Close()
			mustSync(b, balancer, changes...)
			last := changes[services-1]
			for b.Loop() {
				slices.Reverse(last.Backends)
				mustSync(b, balancer, last)
			}
		})
	}
}

func mustLoadDetached(b *testing.B) *lb.Balancer {
	b.Helper()
	balancer, err := lb.Load(lb.Options{Grace: 1})
	if err != nil {
		b.Skipf("skipped: %v", err)
	}
	return balancer
}

func manyChanges(n int) []lb.Change {
	changes := make([]lb.Change, n)
	for i := range changes {
		address := netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})
		changes[i] = to(lb.Frontend{Address: netip.AddrPortFrom(address, 80), Protocol: lb.TCP}, sinks...)
	}
	return changes
}

// medianInterval gives the 95 % interval of the median of sorted values, by the ranks between which it is (the binomial distribution's normal
// approximation).
func medianInterval(sorted []float64) (low, high float64) {
	n := len(sorted)
	reach := int(math.Ceil(0.98 * math.Sqrt(float64(n))))
	return sorted[max(n/2-reach, 0)], sorted[min(n/2+reach, n-1)]
}

func median[T int64 | float64](values []T) float64 {
	slices.Sort(values)
	return float64(values[len(values)/2])
}
