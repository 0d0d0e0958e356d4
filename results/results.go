// SPDX-License-Identifier: Apache-2.0

// Package results keeps what a run found: records, statistics, complexity fits, CSV, pictures, the report, and the comparison of two runs.
//
// A run is a folder. While it lasts, a [Writer] appends one [Record] after the other to records.txt, in the Go
// benchmark format that benchstat reads, beside environment.json. All else in the folder (results.csv, verdicts.csv,
// crossovers.csv, the pictures and report.md) is rendered by [Run.Render] from those two files alone.
package results

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// The files of a run's folder.
const (
	RecordsFile     = "records.txt"
	EnvironmentFile = "environment.json"
	ResultsFile     = "results.csv"
	VerdictsFile    = "verdicts.csv"
	CrossoversFile  = "crossovers.csv"
	ReportFile      = "report.md"
)

// Record is one visit of one mode at one rung for one target in one round.
type Record struct {
	Scenario string // "connect", "tax", "programming"; [a-z][a-z0-9-]*
	Provider string // "lab"
	Kernel   string // "6.18", that of the node
	Mode     string // "iptables"
	Target   string // "head", "middle", "tail", "random"; "pod" for tax, "fleet" for programming

	Services  int // the rung: how many Services the node carried
	Endpoints int // endpoints of each Service
	Round     int // from 0

	// Again marks a visit of the smallest rung after the largest one. Such visits
	// tell whether the machine drifted; no fit and no median uses them.
	Again bool

	Count  int64 // operations that succeeded
	Errors int64 // operations that failed or timed out

	Values   []Value
	Warnings []string // what makes this visit doubtful; printed under the tables

	// Skipped is the reason why there is nothing to measure here; Values is empty then.
	Skipped string
}

// Value is one measured figure of a record. Its name in the benchmark format is Metric-Unit: "p50-ns", "cpu-ns/op", "rss-bytes".
type Value struct {
	Metric string  // "p50", "cpu", "proxy-cpu", "rss"
	Unit   string  // "ns", "ns/op", "bytes"; without "-"
	Value  float64 // finite
}

// Mode describes one mode of the run to the statistics and the pictures.
type Mode struct {
	Name string
	Doc  string // one line

	// Floor names the mode whose cost is subtracted before anything is fitted: what is
	// left is what the Service costs. "" makes this mode a floor itself.
	Floor string `json:",omitempty"`

	// Twin names the mode that this one repeats on a node of its own. The
	// differences between the two, which have no cause, are the noise floor.
	Twin string `json:",omitempty"`

	Style Style `json:",omitzero"`
}

// Style says how a mode is drawn. The zero value takes the next free colour, dash and marker of a palette that the colour-blind can read.
type Style struct {
	Color  string `json:",omitempty"` // "#D55E00"
	Dash   string `json:",omitempty"` // "solid", "dash", "dot", "dashdot"
	Marker string `json:",omitempty"` // "circle", "square", "triangle", "pyramid", "cross", "plus", "ring", "box"
}

// Environment is where, when and how a run was made. It is written to
// environment.json when the run begins and again when it ends.
type Environment struct {
	Run     string    // the run's name
	Seed    int64     // of the visits' order and of every bootstrap
	Command []string  `json:",omitempty"` // argv
	Start   time.Time //
	End     time.Time // zero while the run lasts, and after a crash

	GOOS, GOARCH string
	Kernel       string // of the host, as uname -r prints it
	CPU          string // the processor's model
	NumCPU       int
	MemoryBytes  int64

	Commit string // of plimsoll
	Dirty  bool   // the checkout had changes that are not in Commit
	Go     string // "go1.26.0"

	Versions map[string]string `json:",omitempty"` // "kubernetes", "etcd", "iptables", "nft"
	Sysctls  map[string]string `json:",omitempty"` // as read, never set
	Settings map[string]string `json:",omitempty"` // "proxy": "like for like"

	Modes []Mode
	Plan  Plan

	Extra map[string]string `json:",omitempty"` // whatever else is worth keeping
}

// Plan is what the run set out to measure.
type Plan struct {
	Scenarios []string
	Services  []int // the ladder
	Endpoints int
	Rounds    int
	Rate      float64 // operations a second while CPU is measured; 0 means as fast as they go
}

// Run is what a run's folder holds.
type Run struct {
	Environment Environment
	Records     []Record

	// Warnings are about the reading itself, such as a last line that a crash cut short.
	Warnings []string
}

// Read reads the run in dir. A record that was cut short at the end of the file becomes a
// warning; any other line that is no record is an error that names file and line.
func Read(dir string) (*Run, error) {
	r := &Run{}
	b, err := os.ReadFile(filepath.Join(dir, EnvironmentFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s holds no run: it has no %s", dir, EnvironmentFile)
	}
	if err != nil {
		return nil, fmt.Errorf("read environment: %w", err)
	}
	if err := json.Unmarshal(b, &r.Environment); err != nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Join(dir, EnvironmentFile), err)
	}
	name := filepath.Join(dir, RecordsFile)
	b, err = os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("read records: %w", err)
	}
	r.Records, r.Warnings, err = decode(b, name)
	if err != nil {
		return nil, err
	}
	return r, nil
}

// mode returns the description of a mode. A mode that the environment does
// not know, as in a folder that was put together by hand, has only its name.
func (e *Environment) mode(name string) Mode {
	for _, m := range e.Modes {
		if m.Name == name {
			return m
		}
	}
	return Mode{Name: name}
}
