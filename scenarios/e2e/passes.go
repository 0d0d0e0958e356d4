// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/results"
)

// The files of a pass: a line for each spec that has ended, for each that is not run, and for each batch.
const (
	endedFile   = "ended.jsonl"
	leftFile    = "left.jsonl"
	batchesFile = "batches.jsonl"
)

// A batch is what was run at a stretch.
type batch struct {
	Began   time.Time
	Seconds float64
	// About says with what and on what it was run: a run may be resumed with another program.
	About string
}

// A pass is one run of the specs in one cluster.
type pass struct {
	mode   string
	family clusters.IPFamily
	run    int
}

func (p pass) String() string { return fmt.Sprintf("%s, %s, run %d", p.mode, p.family, p.run) }

// passes are all of a mode's in clusters of a family.
func (s *suite) passes(mode string, family clusters.IPFamily) []pass {
	var all []pass
	for run := 1; run <= s.plan.Runs; run++ {
		all = append(all, pass{mode, family, run})
	}
	return all
}

// belongs tells whether a spec is one for clusters of the pass's family.
func (p pass) belongs(spec string) bool {
	return p.family == clusters.DualStack || !strings.Contains(spec, dualStack)
}

// dir is a pass's folder.
func (s *suite) dir(p pass) string {
	return filepath.Join(s.plan.Out, p.mode, string(p.family), strconv.Itoa(p.run))
}

// ended are the specs that have ended in a pass.
func (s *suite) ended(p pass) ([]Spec, error) {
	return readLines[Spec](filepath.Join(s.dir(p), endedFile))
}

// leftIn are the specs that are not run in a pass.
func (s *suite) leftIn(p pass) ([]Spec, error) {
	return readLines[Spec](filepath.Join(s.dir(p), leftFile))
}

// due are the chosen specs that have not ended in a pass.
func (s *suite) due(p pass) ([]string, error) {
	ended, err := s.ended(p)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(s.chosen), func(name string) bool {
		return !p.belongs(name) || slices.ContainsFunc(ended, func(e Spec) bool { return e.Name == name })
	}), nil
}

// leave keeps which specs are not run in a pass, and why: those that no cluster can pass in one that was begun; where its mode is refused the others
// too, once. They are those in the focus, and those that other commands in this folder have left by another one.
func (s *suite) leave(p pass, refused string) error {
	file := filepath.Join(s.dir(p), leftFile)
	ended, err := s.ended(p)
	if err != nil {
		return err
	}
	if len(ended) == 0 && (refused == "" || p.run > 1) {
		return os.RemoveAll(file) // refused before
	}
	earlier, err := s.leftIn(p)
	if err != nil {
		return err
	}
	names := slices.Clone(s.names)
	for _, e := range earlier {
		names = append(names, e.Name)
	}
	slices.Sort(names)
	var left []Spec
	for _, name := range slices.Compact(names) {
		why := cannot(name)
		if why == "" && refused != "" {
			why = fmt.Sprintf("mode %s: %s", p.mode, refused)
		}
		if why != "" && p.belongs(name) {
			left = append(left, Spec{Name: name, Outcome: Skipped, Reason: why})
		}
	}
	lines, err := toLines(left...)
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(s.dir(p), 0o755), results.WriteFile(file, lines))
}

// readLines reads a file of JSON objects, none where there is no file. A line that was cut off does not count.
func readLines[T any](file string) ([]T, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []T
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var one T
		if json.Unmarshal(lines.Bytes(), &one) == nil {
			all = append(all, one)
		}
	}
	return all, lines.Err()
}

// appendLines adds JSON objects to a file, after what may be a line that was cut off.
func appendLines[T any](file string, objects ...T) error {
	lines, err := toLines(objects...)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append([]byte("\n"), lines...))
	return errors.Join(err, f.Close())
}

// toLines are objects as lines of JSON.
func toLines[T any](objects ...T) ([]byte, error) {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	for _, o := range objects {
		if err := encoder.Encode(o); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), nil
}
