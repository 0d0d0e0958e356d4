// SPDX-License-Identifier: Apache-2.0

package results

import (
	"fmt"
	"math"
	"math/rand/v2"
	"time"
)

// synthetic makes runs whose truth is known.
type synthetic struct {
	seed   uint64
	ladder []int
	rounds int
	rho    float64 // rung-to-rung effect of each node, relative
	sigma  float64 // noise of each visit, relative
	modes  []Mode
	drift  float64 // of the machine at the end, relative
}

var allModes = []Mode{
	{Name: "direct", Doc: "no Service: the backend's own address on a clean node"},
	{Name: "direct-twin", Doc: "direct on a second node", Floor: "direct", Twin: "direct"},
	{Name: "direct-conntrack", Doc: "direct with conntrack and NAT hooks alive"},
	{Name: "iptables", Doc: "kube-proxy, iptables-nft", Floor: "direct-conntrack"},
	{Name: "iptables-legacy", Doc: "kube-proxy, iptables-legacy", Floor: "direct-conntrack"},
	{Name: "ipvs", Doc: "kube-proxy, IPVS", Floor: "direct-conntrack"},
	{Name: "nftables", Doc: "kube-proxy, nftables", Floor: "direct-conntrack"},
	{Name: "ebpf", Doc: "the embedded load balancer", Floor: "direct"},
}

// cost is the truth in nanoseconds: what a connection takes in mode for target at n Services.
func cost(mode, scenario, target string, n float64) float64 {
	position := map[string]float64{"head": 0, "middle": 0.5, "tail": 1, "random": 0.5, "pod": 1}[target]
	switch mode {
	case "direct-conntrack":
		return 19400
	case "iptables":
		return 22000 + 15*n*position
	case "iptables-legacy":
		return 20500 + 2.7*n*position
	case "nftables":
		if scenario == "tax" {
			return 19800
		}
		return 23600
	case "ebpf":
		if scenario == "tax" {
			return 16010
		}
		return 16300
	}
	return 16000
}

func (s synthetic) run() *Run {
	rng := rand.New(rand.NewPCG(s.seed, 1))
	run := &Run{Environment: Environment{
		Run: "synthetic", Seed: int64(s.seed), Command: []string{"plimsoll", "run", "connect", "tax", "programming", "--out", "a folder"},
		Start: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), End: time.Date(2026, 1, 2, 3, 24, 5, 0, time.UTC),
		GOOS: "linux", GOARCH: "amd64", Kernel: "6.18.1", CPU: "Example CPU @ 2.50GHz", NumCPU: 2, MemoryBytes: 24 << 30, Commit: "0123456789ab", Go: "go1.26.0",
		Versions: map[string]string{"kubernetes": "v1.36.3", "iptables": "v1.8.9 (nf_tables)"},
		Sysctls:  map[string]string{"net.netfilter.nf_conntrack_max": "262144"},
		Settings: map[string]string{"proxy": "like for like"},
		Modes:    s.modes,
		Plan:     Plan{Scenarios: []string{"connect", "tax", "programming"}, Services: s.ladder, Endpoints: 2, Rounds: s.rounds, Rate: 1000},
	}}
	if run.Environment.Modes == nil {
		run.Environment.Modes = allModes
	}
	visits := [][2]string{{"connect", "head"}, {"connect", "middle"}, {"connect", "tail"}, {"connect", "random"}, {"tax", "pod"}}
	type rungAgain struct {
		n     int
		again bool
	}
	var ladder []rungAgain
	for _, n := range s.ladder {
		ladder = append(ladder, rungAgain{n, false})
	}
	ladder = append(ladder, rungAgain{s.ladder[0], true})
	lost := false // iptables, from the first rung on that it does not reach, as in a run
	for _, step := range ladder {
		lost = lost || step.n > 10000
		effect := map[string]float64{}
		for _, m := range run.Environment.Modes {
			effect[m.Name] = 1 + s.rho*rng.NormFloat64()
			if step.again {
				effect[m.Name] += s.drift
			}
		}
		for round := range s.rounds {
			for _, m := range run.Environment.Modes {
				for _, v := range visits {
					r := Record{Scenario: v[0], Provider: "lab", Kernel: "6.18", Mode: m.Name, Target: v[1], Services: step.n, Endpoints: 2, Round: round, Again: step.again}
					switch {
					case m.Name == "ipvs":
						r.Skipped = "this kernel has no ip_vs"
					case m.Name == "iptables" && lost:
						r.Skipped = "not programmed in 5m0s"
					default:
						noise := func() float64 { return effect[m.Name] * (1 + s.sigma*rng.NormFloat64()) }
						y := cost(m.Name, v[0], v[1], float64(step.n))
						r.Count = 2000
						p50, p99, cpu := y*noise(), 2*y*noise(), 1.5*y*noise()
						r.Values = []Value{
							{"p50", "ns", math.Round(p50)},
							{"p90", "ns", math.Round(0.6 * p99)},
							{"p99", "ns", math.Round(p99)},
							{"max", "ns", math.Round(20 * p99)},
							{"mean", "ns", math.Round(1.1 * p50)},
							{"quiet", "percent", float64(90 - round)},
							{"cpu", "ns/op", math.Round(cpu)},
							{"machine-cpu", "ns/op", math.Round(1.25 * cpu)},
							{"other-cpu", "percent", float64(round) / 4},
						}
						if m.Floor != "" {
							r.Values = append(r.Values, Value{"proxy-cpu", "ns/op", float64(round / 5 * 200)})
						}
						if m.Name == "nftables" && round == 2 && step.n == s.ladder[0] && v[1] == "tail" {
							r.Errors = 3
							r.Warnings = []string{"other processes used 7 % of the CPU"}
						}
					}
					run.Records = append(run.Records, r)
				}
			}
		}
		if step.again {
			break
		}
		for _, m := range run.Environment.Modes {
			if m.Floor == "" || m.Twin != "" || m.Name == "ipvs" || m.Name == "iptables" && step.n > 10000 {
				continue
			}
			perService := map[string]float64{"iptables": 3.2e6, "iptables-legacy": 7e4, "nftables": 4e6, "ebpf": 2e4}[m.Name]
			run.Records = append(run.Records, Record{
				Scenario: "programming", Provider: "lab", Kernel: "6.18", Mode: m.Name, Target: "fleet", Services: step.n, Endpoints: 2, Count: 1,
				Values: []Value{
					{"fleet-written", "ns", 1e4 * float64(step.n)},
					{"fleet-listed", "ns", 2e4 * float64(step.n)},
					{"programming", "ns", math.Round(2e7 + perService*float64(step.n))},
					{"proxy-programming-cpu", "ns", math.Round(1e7 + perService/2*float64(step.n))},
					{"proxy-rss", "bytes", float64(4<<20 + 9000*step.n)},
				},
			})
		}
	}
	return run
}

// noisyRungs returns the rungs of a mode whose cost is f, minus a floor of 16 µs, and those of the floor's A/A pair. Every node has a rung effect of its own.
func noisyRungs(rng *rand.Rand, ladder []int, rounds int, rho, sigma float64, f func(n float64) float64) (mode, aa []rung) {
	const floor = 16000
	for _, n := range ladder {
		a, b, c := &series{}, &series{}, &series{}
		for _, s := range []struct {
			*series
			cost float64
		}{{a, f(float64(n))}, {b, floor}, {c, floor}} {
			effect := 1 + rho*rng.NormFloat64()
			s.visits = map[int]map[int]float64{n: {}}
			for r := range rounds {
				s.visits[n][r] = s.cost * (effect + sigma*rng.NormFloat64())
			}
		}
		mode = append(mode, difference(a, b)...)
		aa = append(aa, difference(c, b)...)
	}
	return mode, aa
}

func settingName(rungs, rounds int, rho, sigma float64) string {
	return fmt.Sprintf("rungs=%d/rounds=%d/effect=%g%%/noise=%g%%", rungs, rounds, 100*rho, 100*sigma)
}
