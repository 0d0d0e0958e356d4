// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"

	"github.com/plimsoll-bench/plimsoll/scenarios/load"
)

// SamplesFile keeps the distribution of every visit's latencies: one line a visit, its key and an HDR histogram of
// nanoseconds with three significant digits in the V2 compressed encoding, base64; a second line holds what did not count.
const SamplesFile = "histograms.txt"

type samples struct {
	file *os.File
}

func createSamples(dir string) (*samples, error) {
	f, err := os.OpenFile(filepath.Join(dir, SamplesFile), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return nil, fmt.Errorf("create the samples' file: %w", err)
	}
	return &samples{file: f}, nil
}

func (s *samples) append(m measured) error {
	r, again := m.record, ""
	if r.Again {
		again = "/again=1"
	}
	for _, part := range []struct {
		name      string
		latencies []int64
	}{{"", m.latencies}, {"/disturbed=1", m.disturbed}} {
		h, err := load.EncodeHistogram(part.latencies)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(s.file, "%s/mode=%s/target=%s/services=%d/round=%d%s%s %s\n",
			r.Scenario, r.Mode, r.Target, r.Services, r.Round, again, part.name, base64.StdEncoding.EncodeToString(h))
		if err != nil {
			return fmt.Errorf("keep the samples: %w", err)
		}
	}
	return nil
}

func (s *samples) close() error { return s.file.Close() }
