// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/plimsoll-bench/plimsoll/results"
	"github.com/plimsoll-bench/plimsoll/scenarios/load"
)

// SamplesFile keeps the distribution of every visit's latencies: one line a visit, its key and an HDR histogram of
// nanoseconds with three significant digits in the V2 compressed encoding, base64; a second line holds what did not count.
const SamplesFile = "histograms.txt"

// CountsFile keeps what each operation took that guests count: one line a target, its key and the instructions in the operations' order.
const CountsFile = "counts.txt"

// samples is a file of either kind.
type samples struct {
	file *os.File
}

func createSamples(dir, name string) (*samples, error) {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return nil, fmt.Errorf("create the samples' file: %w", err)
	}
	return &samples{file: f}, nil
}

func (s *samples) append(m measured) error {
	for _, part := range []struct {
		name      string
		latencies []int64
	}{{"", m.latencies}, {"/disturbed=1", m.disturbed}} {
		h, err := load.EncodeHistogram(part.latencies)
		if err != nil {
			return err
		}
		if err := s.write(m.record, part.name, base64.StdEncoding.EncodeToString(h)); err != nil {
			return err
		}
	}
	return nil
}

func (s *samples) appendCounts(l line) error {
	if len(l.Counts) == 0 {
		return nil
	}
	return s.write(l.Record, "", strings.Trim(fmt.Sprint(l.Counts), "[]"))
}

func (s *samples) write(r results.Record, part, text string) error {
	again := ""
	if r.Again {
		again = "/again=1"
	}
	_, err := fmt.Fprintf(s.file, "%s/mode=%s/target=%s/services=%d/round=%d%s%s %s\n", r.Scenario, r.Mode, r.Target, r.Services, r.Round, again, part, text)
	if err != nil {
		return fmt.Errorf("keep the samples: %w", err)
	}
	return nil
}

func (s *samples) close() error { return s.file.Close() }
