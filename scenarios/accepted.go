// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"
	"strconv"

	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/results"
)

// A Stage is what counts of instructions hold for: with another kernel, emulator or recipe they are others.
type Stage struct {
	Kernel string // its release
	QEMU   string // its version
	Recipe string // what a cell is and how a guest is made
}

func (s Stage) String() string {
	return fmt.Sprintf("kernel %s, %s, recipe %s", s.Kernel, s.QEMU, s.Recipe)
}

// A Tally is how many instructions an operation of a mode takes at a rung, or a part of them.
type Tally struct {
	Stage
	Mode, Scenario, Target string
	Services               int
	Metric                 string // "above-direct", of the least that an operation took, or "hook"
	Instructions           float64
	// Of is what a tolerance is a share of: the mode's whole count, or that of its hook where nothing else is in it; not kept.
	Of float64
}

func (c Tally) key() string {
	return fmt.Sprintf("%s/%s/%s/%d/%s", c.Mode, c.Scenario, c.Target, c.Services, c.Metric)
}

// acceptedTolerance is how far a count may be from the accepted one, as a share of the mode's whole count. For the same seed counts are the same
// to the last digit as long as the programs are; but where any program in the guest changes, so does when it asks for the kernel's randomness, and
// with that how long the chains of the kernel's hash tables are. What BPF programs take by themselves depends on it only where a Service shares its
// bucket of the load balancer's table, whose seed is such a number, too (some 17 instructions for each that stands before it), and hardly any does: the
// least of all targets does not, and its share is of that alone, so that two instructions more are seen.
const acceptedTolerance = 0.005

// limit is how far a count may be from the accepted one.
func (c Tally) limit() float64 { return max(1, acceptedTolerance*c.Of) }

const (
	aboveMetric = "above-direct"
	hookMetric  = "hook"
	leastTarget = "least" // of all targets
)

// AcceptedPlan is what counts are accepted of. Seed and connects are part of the recipe.
func AcceptedPlan() Plan {
	return Plan{
		Scenarios: []string{connect{}.Name(), tax{}.Name()},
		Modes:     []string{"direct", "direct-conntrack", "iptables", "iptables-legacy", "ipvs", "nftables", "ebpf", "ebpf-packet"},
		Services:  []int{10, 1000}, Endpoints: 2, Rounds: 1, Seed: 1, Connects: 400, Settings: dataplane.Settings{},
	}
}

// TalliesOf are the counts of a run of AcceptedPlan. A skipped mode is an error: the guest's kernel has every mode.
func TalliesOf(records []results.Record, stage Stage) (all []Tally, err error) {
	value := func(r results.Record, metric string) (float64, bool) {
		i := slices.IndexFunc(r.Values, func(v results.Value) bool { return v.Metric == metric && v.Unit == instructions })
		if i < 0 {
			return 0, false
		}
		return r.Values[i].Value, true
	}
	type place struct {
		scenario, target string
		services         int
	}
	floor := make(map[place]float64)
	for _, r := range records {
		if least, has := value(r, "min"); has && r.Mode == dataplane.Floor {
			floor[place{r.Scenario, r.Target, r.Services}] = least
		}
	}
	for _, r := range records {
		if r.Skipped != "" {
			return nil, fmt.Errorf("%s, %d Services: %s", r.Mode, r.Services, r.Skipped)
		}
		if r.Errors > 0 {
			return nil, fmt.Errorf("%s, %d Services, %s %s: %d connects failed", r.Mode, r.Services, r.Scenario, r.Target, r.Errors)
		}
		least, has := value(r, "min")
		direct, known := floor[place{r.Scenario, r.Target, r.Services}]
		if !has || !known || r.Mode == dataplane.Floor {
			continue
		}
		c := Tally{Stage: stage, Mode: r.Mode, Scenario: r.Scenario, Target: r.Target, Services: r.Services, Metric: aboveMetric, Instructions: least - direct, Of: least}
		all = append(all, c)
		if hook, has := value(r, hookMetric); has {
			c.Metric, c.Instructions = hookMetric, math.Round(hook*100)/100
			if m, err := dataplane.Find(r.Mode); err == nil && m.Floor() == dataplane.Floor {
				// Its programs call nothing whose way depends on chance, as conntrack's.
				c.Of, c.Target = hook, leastTarget
				if i := slices.IndexFunc(all, func(a Tally) bool { return a.key() == c.key() }); i >= 0 {
					if c.Instructions < all[i].Instructions {
						all[i] = c
					}
					continue
				}
			}
			all = append(all, c)
		}
	}
	return all, nil
}

// acceptedHeader is the first line of a file of accepted counts.
var acceptedHeader = []string{"kernel", "qemu", "recipe", "mode", "scenario", "target", "services", "metric", "instructions"}

// ReadAccepted reads accepted counts; without a file there are none.
func ReadAccepted(file string) (all []Tally, err error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if len(rows) == 0 || !slices.Equal(rows[0], acceptedHeader) {
		return nil, fmt.Errorf("%s: want the columns %v", file, acceptedHeader)
	}
	for i, row := range rows[1:] {
		c := Tally{Stage: Stage{row[0], row[1], row[2]}, Mode: row[3], Scenario: row[4], Target: row[5], Metric: row[7]}
		c.Services, err = strconv.Atoi(row[6])
		if err == nil {
			c.Instructions, err = strconv.ParseFloat(row[8], 64)
		}
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, i+2, err)
		}
		all = append(all, c)
	}
	return all, nil
}

// WriteAccepted writes accepted counts.
func WriteAccepted(file string, all []Tally) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := csv.NewWriter(f)
	rows := [][]string{acceptedHeader}
	for _, c := range all {
		rows = append(rows, []string{c.Kernel, c.QEMU, c.Recipe, c.Mode, c.Scenario, c.Target, strconv.Itoa(c.Services), c.Metric, strconv.FormatFloat(c.Instructions, 'f', -1, 64)})
	}
	return w.WriteAll(rows)
}

// Accept returns the accepted counts with new ones in place of those of their stage.
func Accept(accepted, counts []Tally) []Tally {
	if len(counts) == 0 {
		return accepted
	}
	kept := slices.DeleteFunc(slices.Clone(accepted), func(c Tally) bool { return c.Stage == counts[0].Stage })
	return append(kept, counts...)
}

// Differences lists, a line each, which counts are further from the accepted ones than their limit, or have none. known is false where none
// was accepted on their stage.
func Differences(accepted, counts []Tally) (lines []string, known bool) {
	want := make(map[string]Tally)
	for _, c := range accepted {
		if len(counts) > 0 && c.Stage == counts[0].Stage {
			want[c.key()] = c
		}
	}
	for _, c := range counts {
		w, has := want[c.key()]
		delete(want, c.key())
		if d := c.Instructions - w.Instructions; !has {
			lines = append(lines, fmt.Sprintf("%s: %.5g instructions, and none accepted", c.key(), c.Instructions))
		} else if known = true; math.Abs(d) > c.limit() {
			lines = append(lines, fmt.Sprintf("%s: %.5g instructions, accepted %.5g: %+.4g, more than %.3g", c.key(), c.Instructions, w.Instructions, d, c.limit()))
		}
	}
	for _, c := range want {
		lines = append(lines, fmt.Sprintf("%s: accepted %.5g instructions, and not counted", c.key(), c.Instructions))
	}
	slices.Sort(lines)
	return lines, known
}
