// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/plimsoll-bench/plimsoll/scenarios"
)

// progress tells a person what a run does: on a terminal with a bar and the time left, in a pipe with plain lines. All of it
// goes to the run's log too.
type progress struct {
	mu    sync.Mutex
	out   io.Writer
	log   *os.File
	bar   *progressbar.ProgressBar // nil in a pipe
	began time.Time                // of the first visit
	told  time.Time                // when the last plain progress line was printed
}

var _ scenarios.Reporter = (*progress)(nil)

// logFile is the name of the file in a folder of results that tells what was done, and when.
const logFile = "log.txt"

// plainEvery is how often a pipe is told how far a run is.
const plainEvery = 10 * time.Second

// newProgress shows on out how far a run is, and keeps it in the folder of its results.
func newProgress(out io.Writer, dir string) (*progress, error) {
	log, err := os.OpenFile(filepath.Join(dir, logFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open the run's log: %w", err)
	}
	p := &progress{out: out, log: log}
	if f, ok := out.(interface{ Fd() uintptr }); ok && term.IsTerminal(int(f.Fd())) {
		p.bar = progressbar.NewOptions(1, progressbar.OptionSetWriter(out), progressbar.OptionSetWidth(24),
			progressbar.OptionSetPredictTime(true), progressbar.OptionShowCount(), progressbar.OptionFullWidth(),
			progressbar.OptionClearOnFinish(), progressbar.OptionThrottle(100*time.Millisecond))
	}
	return p, nil
}

func (p *progress) Step(what string) { p.say("", what) }
func (p *progress) Warn(what string) { p.say("warning: ", what) }

func (p *progress) say(prefix, what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		p.bar.Clear()
	}
	fmt.Fprintf(p.out, "%s %s%s\n", time.Now().Format("15:04:05"), prefix, what)
	p.write(prefix + what)
}

func (p *progress) Progress(done, total int, what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.began.IsZero() {
		p.began = now
	}
	p.write(fmt.Sprintf("visit %d of %d: %s", done+1, total, what))
	if p.bar != nil {
		p.bar.ChangeMax(total)
		p.bar.Describe(what)
		p.bar.Set(done)
		return
	}
	if now.Sub(p.told) < plainEvery {
		return
	}
	p.told = now
	left := ""
	if done > 0 {
		left = fmt.Sprintf(", about %s left", (now.Sub(p.began) / time.Duration(done) * time.Duration(total-done)).Round(time.Second))
	}
	fmt.Fprintf(p.out, "%s %s (visit %d of %d%s)\n", now.Format("15:04:05"), what, done+1, total, left)
}

// write adds a line to the log. What goes wrong here goes wrong with the records too, and is told there.
func (p *progress) write(line string) {
	fmt.Fprintf(p.log, "%s %s\n", time.Now().UTC().Format(time.RFC3339Nano), line)
}

func (p *progress) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	if p.bar != nil {
		errs = append(errs, p.bar.Exit())
	}
	return errors.Join(append(errs, p.log.Close())...)
}
