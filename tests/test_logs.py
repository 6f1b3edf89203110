"""What the package says: nothing by default, on the console in its commands, in nnU-Net's log in training."""
from __future__ import annotations

import logging
import subprocess
import sys

from nnunet_pdddpm.logs import log_forwarded_to, log_to_console

logger = logging.getLogger('nnunet_pdddpm.inference.predictor')


def test_a_command_shows_progress_and_warnings_on_streams_of_their_own(capsys):
    log_to_console()
    log_to_console()  # as two commands in one process
    logger.debug('a detail')
    logger.info('%d cases are done.', 2)
    logger.warning('A mask is left out.')
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ('2 cases are done.\n', 'A mask is left out.\n')


def test_who_imports_the_package_sees_nothing_unless_asked_for():
    code = 'import logging, nnunet_pdddpm; logging.getLogger("nnunet_pdddpm.inference").warning("a warning")'
    silent = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, '', '')
    asked = subprocess.run([sys.executable, '-c', f'import logging; logging.basicConfig(); {code}'],
                           capture_output=True, text=True)
    assert 'a warning' in asked.stderr


def test_in_training_it_goes_to_nnunets_log_alone(capsys):
    log_to_console()
    said: list[str] = []
    with log_forwarded_to(said.append):
        logger.info('%d cases are done.', 2)
        logger.warning('A mask is left out.')
    assert said == ['2 cases are done.', 'A mask is left out.']
    assert capsys.readouterr() == ('', '')
    logger.info('Afterwards.')
    assert capsys.readouterr().out == 'Afterwards.\n'
