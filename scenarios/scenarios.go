// SPDX-License-Identifier: Apache-2.0

// Package scenarios is what is measured: one file a scenario, and the run that visits every mode at every rung, round by
// round.
package scenarios

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"

	"github.com/plimsoll-bench/plimsoll/scenarios/load"
)

// A Scenario is something that is measured.
type Scenario interface {
	// Name is the word on the command line.
	Name() string
	// Doc is one line for `plimsoll list`.
	Doc() string
	// Targets are the groups of addresses that are measured apart.
	Targets() []string
}

// A connecting scenario says which addresses the client pod connects to. How connects are made and recorded is the same for all.
type connecting interface {
	Scenario
	// Services picks the Services that stand for target on a site, as numbers in the fleet. count is the largest number of
	// connects to come.
	Services(r *rung, site *site, target string, rng *rand.Rand, count int) []int
	// Spread is how many times the plan's number of connects a visit times for target: more than once where the cost differs
	// from Service to Service, so that the median does not hang on which ones were drawn.
	Spread(target string) int
	// ThroughService is true when clients connect to a Service's address, false when to its endpoints' own. On a floor's
	// node, which carries no Services, it is always the endpoints' own.
	ThroughService() bool
}

// A probing scenario asks the probes, Services beside the fleet, and is for guests alone: packets are counted one by one there.
type probing interface {
	Scenario
	// request is what is asked of the client pod, or where outside is true of a client beyond the node.
	request(p *probes, target string) (r load.Request, outside bool)
}

// Scenarios are all scenarios.
var Scenarios = []Scenario{
	connect{},
	tax{},
	first{},
	established{},
	udp{},
	nodeport{},
}

// InGuests tells whether a scenario can be measured in guests alone.
func InGuests(s Scenario) bool {
	_, probes := s.(probing)
	return probes
}

// Find is the scenario of that name. The error lists the names that there are.
func Find(name string) (Scenario, error) {
	names := make([]string, len(Scenarios))
	for i, s := range Scenarios {
		if s.Name() == name {
			return s, nil
		}
		names[i] = s.Name()
	}
	return nil, fmt.Errorf("scenario %q is not one of %s", name, strings.Join(names, ", "))
}

// findAll are the scenarios of these names.
func findAll(names []string) ([]Scenario, error) {
	all := make([]Scenario, len(names))
	for i, name := range names {
		var err error
		if all[i], err = Find(name); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Metric documents one figure that records carry.
type Metric struct{ Name, Doc string }

// Metrics are the figures of this package's records, for `plimsoll list`.
var Metrics = []Metric{
	{"p50-ns", "service time: one raw blocking connect(2) from call to return, median of a visit (p90, p99, max, mean alike)"},
	{"quiet-percent", "share of the connects that were made while the CPU ran at its full speed; only they count"},
	{"quiet-limit-ns", "how long the reference, 32 × getppid(2), may take at this rung for a connect to count"},
	{"other-cpu-percent", "share of the machine that everything but the visited site and this program used during a visit"},
	{"cpu-ns/op", "CPU per connect at the stated rate: client, server, kernel threads and softirq together"},
	{"machine-cpu-ns/op", "the same from outside: the machine's wall clock × CPUs − idle; a cross-check that holds all else too"},
	{"proxy-cpu-ns/op", "CPU of the proxy's processes alone in the same time"},
	{"fleet-listed-ns", "until the API server's LISTs showed the rung's Services, counted from the first write"},
	{"programming-ns", "from the moment when the proxy may see a rung's Services until the newest answers and the rules or maps count N"},
	{"proxy-programming-cpu-ns", "CPU that the proxy's processes used for that"},
	{"proxy-rss-bytes", "resident memory of the proxy's processes once the rung is programmed"},
	{"p50-instructions", "in guests: instructions of all that a connect(2) or send(2) sets going, median of a visit (min alike)"},
	{"hook-instructions", "in guests: what of that the load balancer's programs take, the least of five means, with the reading of the clock at each run"},
	{"programming-virtual_s", "in guests: programming-ns by the guest's clock, which goes on by instructions and by waiting"},
	{"added-virtual_s", "in guests: from the write of one Service more until a connect to it succeeds, by the guest's clock"},
}

// addresses are what a site's client connects to for the given Services.
func (s *site) addresses(services []int, throughService bool) []netip.AddrPort {
	var list []netip.AddrPort
	for _, i := range services {
		if throughService {
			list = append(list, s.cluster.fleet.Service(i).Address)
		} else {
			list = append(list, s.cluster.fleet.Backends(i, s.EndpointPrefixes())...)
		}
	}
	return list
}
