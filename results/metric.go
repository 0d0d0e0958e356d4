// SPDX-License-Identifier: Apache-2.0

package results

import "slices"

// metric is what the report knows of a figure by its name.
type metric struct {
	name  string
	words string // for an axis; "" is the name itself

	// cost says that a cluster pays it, so that more of it is worse: it has verdicts and crossovers. What only tells how
	// good a measurement was, or checks another figure, has neither; it is in results.csv.
	cost bool
	// tabled says that report.md has its verdicts and its median at each rung.
	tabled bool
	// pictured lists the scenarios that have a picture of it; see everywhere.
	pictured []string
}

// everywhere stands for all scenarios.
var everywhere = []string{"*"}

// metrics are in the order of the report. A scenario is judged by the first of them that it has. The one without a name stands for all that are not
// listed: a new metric is judged, shown and drawn until its line says otherwise.
var metrics = []metric{
	{name: "p50", words: "median", cost: true, tabled: true, pictured: everywhere},
	{name: "programming", words: "time", cost: true, tabled: true, pictured: everywhere},
	{name: "added", words: "time", cost: true, tabled: true, pictured: everywhere},
	{name: "min", words: "least", cost: true},
	{name: "hook", words: "share of the load balancer's programs", cost: true},
	{name: "fleet-written", words: "time until the Services are written"}, // no mode's: all share one API server
	{name: "fleet-listed", words: "time until the API server lists the Services"},
	{name: "p90", words: "90th percentile", cost: true},
	{name: "p99", words: "99th percentile", cost: true, tabled: true, pictured: []string{"connect"}},
	{name: "p999", words: "99.9th percentile", cost: true},
	{name: "mean", cost: true},
	{name: "max", words: "maximum"}, // of a few thousand connects, the scheduler's, not the mode's
	{name: "", cost: true, tabled: true, pictured: everywhere},
	{name: "cpu", words: "CPU", cost: true, tabled: true, pictured: everywhere},
	{name: "machine-cpu", words: "CPU of the whole machine"},
	{name: "proxy-cpu", words: "CPU of the proxy"},
	{name: "proxy-programming-cpu", words: "CPU of the proxy", cost: true, tabled: true},
	{name: "proxy-rss", words: "resident memory of the proxy", cost: true, tabled: true, pictured: everywhere},
	{name: "quiet", words: "connects at the CPU's full speed"},
	{name: "quiet-limit", words: "slowest reading of the reference at which connects count"},
	{name: "other-cpu", words: "CPU used by all else"},
}

// metricIndex returns the place of a name in metrics.
func metricIndex(name string) int {
	named := func(n string) int { return slices.IndexFunc(metrics, func(m metric) bool { return m.name == n }) }
	if i := named(name); i >= 0 {
		return i
	}
	return named("")
}

// about returns what is known of a metric.
func about(name string) metric {
	m := metrics[metricIndex(name)]
	m.name = name
	if m.words == "" {
		m.words = name
	}
	return m
}

// picturedIn reports whether scenario has a picture of m.
func (m metric) picturedIn(scenario string) bool {
	return slices.Contains(m.pictured, scenario) || slices.Equal(m.pictured, everywhere)
}
