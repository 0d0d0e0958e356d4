// SPDX-License-Identifier: Apache-2.0

package lb_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
)

// BenchmarkConnect times connect(2) over loopback to random Services, in blocks of 500 with as many direct connects from
// a pod without the program between them. An operation is a block of each. Reported are the medians, and what a Service
// adds as the median of the differences between neighbouring blocks.
func BenchmarkConnect(b *testing.B) {
	const block = 500
	backends := []string{"127.0.0.1:8080", "127.0.0.2:8080"}
	for _, services := range []int{1, 20_000, 50_000} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			plain, translated := lbtest.StartPod(b), lbtest.StartPod(b)
			for _, address := range backends {
				plain.Sink(b, address)
				translated.Sink(b, address)
			}
			balancer := mustLoad(b, translated, lb.Options{})
			changes := manyChanges(services)
			mustSync(b, balancer, changes...)
			random := rand.New(rand.NewPCG(1, uint64(services)))

			var direct, service, added []float64
			for b.Loop() {
				d := median(plain.ConnectTimes(b, block, backends))
				targets := make([]string, block)
				for i := range targets {
					targets[i] = changes[random.IntN(services)].Frontend.Address.String()
				}
				s := median(translated.ConnectTimes(b, block, targets))
				direct, service, added = append(direct, d), append(service, s), append(added, s-d)
			}
			b.ReportMetric(median(direct), "direct-ns")
			b.ReportMetric(median(service), "service-ns")
			b.ReportMetric(median(added), "added-ns")
			b.ReportMetric(median(service)/median(direct), "ratio")
		})
	}
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
		changes[i] = to(lb.Frontend{Address: netip.AddrPortFrom(address, 80), Protocol: lb.TCP}, "127.0.0.1:8080", "127.0.0.2:8080")
	}
	return changes
}

func median[T int64 | float64](values []T) float64 {
	slices.Sort(values)
	return float64(values[len(values)/2])
}
